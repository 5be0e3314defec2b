"""What a sparse layer launches beyond a dense one, in a training step with non-reentrant checkpointing.

Counted for one layer in the middle, as a model of four layers less one of three, on the way that a GPU takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

import sparselora_dist.layers.ffn as ffn
import sparselora_dist.layers.neurons as neurons
from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.sync.masks import MaskSync
from sparselora_kernels.backend import forced_triton
from support.launches import Launches
from support.models import ALL_LINEAR, ATTENTION, batch, tiny_lora

KINDS: dict[str, tuple[str, ...]] = {"dense": (), "ffn": ("ffn",), "ffn + attention": ("ffn", "qk", "vo")}
BUDGET = {"ffn": 25, "ffn + attention": 70}
"""Launches beyond a dense layer's."""
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])


def of_a_step(kind: str, layers: int, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    """Launches of the forward, and of backward and recomputation; LoRA on q, k, v and o, fp32, on a base of ``dtype``."""
    model = tiny_lora(num_hidden_layers=layers)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    sparse = {group: {f"0-{layers - 1}": 0.5} for group in KINDS[kind]}
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": sparse} if sparse else {"enabled": False}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    # Without padding, as packed rows are.
    inputs, state = batch(padding=False), find_state(model)
    # On a CPU masks are compared at once; on a GPU that is left to the training loop, once per step.
    with forced_triton(), mock.patch.object(MaskSync, "check", lambda self: self._pending.clear()):
        for _ in range(2):  # The first step fills caches.
            model.zero_grad()
            state.context.hand_over(inputs["labels"], partition_tokens(inputs["labels"], inputs["attention_mask"]))
            with Launches() as forward, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            with Launches() as backward:
                loss.backward()
    return forward.names, backward.names


@cache
def of_a_layer(kind: str, dtype: torch.dtype) -> tuple[Counter[str], Counter[str]]:
    more, less = (of_a_step(kind, layers, dtype) for layers in (4, 3))
    for counts, fewer in zip(more, less):
        counts.subtract(fewer)
    return more


def total(kind: str, dtype: torch.dtype) -> int:
    return sum(counts.total() for counts in of_a_layer(kind, dtype))


@dtypes
@pytest.mark.parametrize("kind", BUDGET)
def test_a_sparse_layer_keeps_its_budget(kind: str, dtype: torch.dtype) -> None:
    more = total(kind, dtype) - total("dense", dtype)
    assert more <= BUDGET[kind], (more, of_a_layer(kind, dtype))


@dtypes
def test_the_count_sees_our_kernels_and_torchs(dtype: torch.dtype) -> None:
    forward, backward = of_a_layer("ffn + attention", dtype)
    assert forward["score_kernel"] == 1 + 3 and forward["select_kernel"] == 3
    assert "score_kernel" not in +backward and "select_kernel" not in +backward
    assert forward["_scaled_dot_product_flash_attention_for_cpu"] == 1


def counted(name: str, original: Callable[..., Any], runs: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        runs[name] += 1
        return original(*args, **options)

    return call


@pytest.mark.parametrize(("targets", "downs"), [(ATTENTION, 2), (ALL_LINEAR, 4)], ids=["no update of down", "update"])
def test_recomputation_stops_where_nothing_after_is_kept(
    targets: list[str], downs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does in a dense layer: there PyTorch keeps the input of down for an adapter of its own only."""
    runs: Counter[str] = Counter()
    for room, name in ((ffn, "gated_up"), (neurons, "ffn_down")):
        monkeypatch.setattr(room, name, counted(name, getattr(room, name), runs))
    model = tiny_lora(targets=targets)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": {"ffn": {"0-2": 0.5}}}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model(**batch(), use_cache=False).loss.backward()
    assert runs == {"gated_up": 4, "ffn_down": downs}, "two layers, as the last needs no mask"
