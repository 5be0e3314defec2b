"""Nothing that is a copy of weight rows stays alive between forward and backward.

Such copies would be whole weights on every rank, which ZeRO-3 and FSDP2 exist to avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import sparselora_dist.layers.ffn
from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_kernels import gated_up
from support.models import ALL_LINEAR, ATTENTION, batch, tiny_lora

LAYERS = {"ffn": {"0-2": 0.5}, "qk": {"0-2": 0.5}, "vo": {"0-2": 0.5}}


def kept_by_autograd(forward: Callable[[], Tensor]) -> list[Tensor]:
    """Every tensor that the graph of ``forward()`` holds: saved for backward, or an attribute of a node."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = forward()  # Held: up to torch 2.11 a node of Python's goes with it.
        nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept += [value for value in getattr(node, "__dict__", {}).values() if isinstance(value, Tensor)]
        nodes += [following for following, _ in node.next_functions]
    return kept


def rows_of(tensor: Tensor) -> set[bytes]:
    """Rows of the last dimension as bytes; too short ones, which could be equal by chance, and zeros left out."""
    if tensor.dim() < 2 or tensor.shape[-1] < 4 or not tensor.is_floating_point():
        return set()
    flat = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
    return {row.view(torch.uint8).numpy().tobytes() for row in flat if bool(row.any())}


def weight_copies(kept: list[Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Names of the frozen weights of which some row or column is in ``kept``, other than as the weight itself."""
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    strangers = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    rows = set().union(*(rows_of(view) for t in strangers for view in (t, t.mT if t.dim() > 1 else t)))
    copied = []
    for name, weight in weights.items():
        casts = [weight.to(dtype) for dtype in (torch.float32, torch.bfloat16)]
        if any(rows & rows_of(view) for cast in casts for view in (cast, cast.t())):
            copied.append(name)
    return copied


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of the decoder layers; the first layer's input is made of rows of the embedding."""
    return {n: p for n, p in model.named_parameters() if ".layers." in n and not p.requires_grad and p.dim() == 2}


def sparse_model(targets: list[str], dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = tiny_lora(targets=targets, dtype=dtype)
    return apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, **options}))


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR], ids=["lora-attention", "lora-all"])
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_weight_rows_is_kept(targets: list[str], lora_branch: str, dtype: torch.dtype) -> None:
    model = sparse_model(targets, dtype, lora_branch=lora_branch)
    weights = frozen_weights(model)
    assert len(weights) == 3 * (7 + 2 * 5)  # Seven matrices and five pairs of factors in each layer.
    kept = kept_by_autograd(lambda: model(**batch()).loss)
    own = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    assert any(t.untyped_storage().data_ptr() in own for t in kept), "the weights themselves should be there"
    assert weight_copies(kept, weights) == []


@pytest.mark.parametrize("form", ["rows", "columns", "cast"])
def test_the_check_sees_a_plain_slice(form: str) -> None:
    x, weight, channels = torch.randn(5, 12, requires_grad=True), torch.randn(9, 12), torch.tensor([1, 4, 6])
    naive = {
        "rows": lambda: x @ weight[channels].t(),
        "columns": lambda: x[:, channels] @ weight[:, channels].t(),
        "cast": lambda: x.bfloat16() @ weight[channels].bfloat16().t(),
    }
    assert weight_copies(kept_by_autograd(naive[form]), {"weight": weight}) == ["weight"]
    lists = torch.tensor([0]), torch.tensor([2, 3]), channels
    ours = kept_by_autograd(lambda: gated_up(x, weight, weight, *lists)[1])
    assert weight_copies(ours, {"weight": weight}) == []


def test_the_check_sees_a_copy_that_hides_in_the_context() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.rows = weight[[0, 2]]
            return x @ ctx.rows.t()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
            return grad @ ctx.rows, None

    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(9, 12)
    assert weight_copies(kept_by_autograd(lambda: Hidden.apply(x, weight)), {"weight": weight}) == ["weight"]


def test_the_check_sees_a_naive_sparse_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model with the product written in the obvious way fails the check above."""

    def naive(x: Tensor, gate: Tensor, up: Tensor, dense: Tensor, context: Tensor, kept: Tensor, **_: Any) -> Any:
        h = nn.functional.silu(x[context] @ gate[kept].t()) * (x[context] @ up[kept].t())
        return nn.functional.silu(x[dense] @ gate.t()) * (x[dense] @ up.t()), h

    monkeypatch.setattr(sparselora_dist.layers.ffn, "gated_up", naive)
    model = sparse_model(ATTENTION)
    copies = weight_copies(kept_by_autograd(lambda: model(**batch()).loss), frozen_weights(model))
    assert [name for name in copies if "gate_proj" in name or "up_proj" in name]


def test_the_transposed_weights_take_the_place_of_the_originals() -> None:
    """No second copy of a frozen weight, before, during or after a step."""
    plain = tiny_lora(targets=ALL_LINEAR)
    count = sum(p.numel() for p in plain.parameters())
    model = sparse_model(ALL_LINEAR)
    factors = sum(p.numel() for name, p in model.named_parameters() if "estimator" in name)
    model(**batch()).loss.backward()
    assert sum(p.numel() for p in model.parameters()) == count + factors
    assert not list(model.buffers()) or {n for n, _ in model.named_buffers()} == {n for n, _ in plain.named_buffers()}
