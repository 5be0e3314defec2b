"""A training step on NF4 weights, in one process: what is decoded, how often, and what of it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels.formats as formats
from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import load_base
from sparselora_dist.sharding.placement import Placement
from support.models import ALL_LINEAR, batch
from support.nf4_workers import adapted

LAYERS, MATRICES = 3, 7
SPARSE = {"layers": {group: {"0-2": 0.5} for group in ("ffn", "qk", "vo")}}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Everything that is decoded."""
    seen: list[Tensor] = []
    original = formats.nf4_rows

    def nf4_rows(*args: Any, **options: Any) -> Tensor:
        seen.append(original(*args, **options))
        return seen[-1]

    monkeypatch.setattr(formats, "nf4_rows", nf4_rows)
    yield seen


@pytest.fixture
def model(base: Path) -> Any:
    section = ModelSection(name_or_path=str(base), dtype="float32")
    loaded = load_base(section, QuantizationSection(load_in_4bit=True), Placement(torch.device("cpu")))
    model = adapted(loaded.model, "single", ALL_LINEAR)
    return apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE), weights=loaded.weights)


def test_each_matrix_is_decoded_once_a_pass(model: Any, decoded: list[Tensor]) -> None:
    """Dense and context tokens share it; the embedding's output needs no gradient, so the first q, k, v are not again."""
    loss = model(**batch()).loss
    assert len(decoded) == LAYERS * MATRICES
    forward = [tuple(rows.shape) for rows in decoded]
    assert (192, 64) in forward and (64, 64) in forward
    decoded.clear()
    loss.backward()
    assert len(decoded) == LAYERS * MATRICES - 3


def test_without_dense_tokens_only_kept_rows_are_decoded(model: Any, decoded: list[Tensor]) -> None:
    inputs = batch(padding=False)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    model(**inputs, num_items_in_batch=1.0, output_hidden_states=True)  # So that the last layer is as the others.
    ffn, kept = [rows for rows in decoded if rows.shape[0] in (192, 96)], 96
    assert len(ffn) == 3 * LAYERS and all(rows.shape[0] == kept for rows in ffn)
    assert all(rows.shape[0] < 64 for rows in decoded if rows.shape[0] not in (192, 96))


def test_autograd_keeps_no_decoded_rows(model: Any, decoded: list[Tensor]) -> None:
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch())
    assert len(decoded) == LAYERS * MATRICES and len(kept) > 20
    assert not kept & {rows.untyped_storage().data_ptr() for rows in decoded}
