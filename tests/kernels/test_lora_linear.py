"""lora_linear equals its reference: base whole for dense tokens, kept channels for context tokens; LoRA whole for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import lora_order, reference
from support.kernel_cases import compare, implementations, nf4, results, running, some, split, wide

# (dense, context, padding tokens, channels, width, kept)
SHAPES = [(3, 5, 2, 7, 3, 4), (1, 1, 0, 1, 1, 1), (4, 9, 3, 13, 5, 1), (4, 9, 0, 13, 5, 13)]
NO_TOKENS = [(4, 0, 1, 7, 5, 3), (0, 4, 1, 7, 5, 3), (0, 0, 3, 7, 5, 3), (0, 0, 0, 7, 5, 3)]
forms = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
SCALING = 1.7


def case(shape: tuple, transposed: bool, rank: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    """(trained, fixed) arguments; ``rank`` 0 is no branch."""
    dense, context, padding, channels, width, kept = shape
    tokens = dense + context + padding
    inputs, outputs = (channels, width) if transposed else (width, channels)
    trained = {"x": torch.randn(tokens, inputs, dtype=dtype)}
    if rank:
        trained |= {"a": torch.randn(rank, inputs, dtype=dtype), "b": torch.randn(outputs, rank, dtype=dtype)}
    rows = split(dense, context, padding)
    fixed = {
        "weight": torch.randn(channels, width, dtype=dtype),
        "bias": torch.randn(outputs, dtype=dtype) if bias else None,
        "scaling": SCALING,
        "transposed": transposed,
        "dense_rows": rows[0],
        "context_rows": rows[1],
        "channels": some(channels, kept),
    }
    return trained, fixed


@pytest.mark.parametrize("shape", SHAPES + NO_TOKENS, ids=str)
@forms
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@implementations
def test_equals_reference(shape: tuple, transposed: bool, rank: int, dtype: torch.dtype, implementation: str) -> None:
    trained, fixed = case(shape, transposed, rank, dtype, bias=rank > 0)
    with running(implementation):
        got = results(kernels.lora_linear, trained, **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    compare(results(reference.lora_linear, double[0], **double[1]), got, dtype)


@forms
@pytest.mark.parametrize("rank", [0, 3])
@implementations
def test_all_tokens_whole(transposed: bool, rank: int, implementation: str) -> None:
    trained, fixed = case((4, 9, 0, 13, 5, 6), transposed, rank)
    fixed = {k: v for k, v in fixed.items() if k not in ("dense_rows", "context_rows", "channels")}
    with running(implementation):
        got = results(kernels.lora_linear, trained, **fixed)
    compare(results(reference.lora_linear, trained, **fixed), got)


@forms
@pytest.mark.parametrize("dense", [0, 3])
@implementations
def test_nf4_equals_the_decoded_weight(transposed: bool, dense: int, implementation: str) -> None:
    trained, fixed = case((dense, 6, 1, 96, 70, 11), transposed, 3)
    stored, values = nf4(fixed.pop("weight"))
    with running(implementation):
        got = results(kernels.lora_linear, trained, weight=stored, **fixed)
    compare(results(reference.lora_linear, trained, weight=values, **fixed), got)


@forms
@implementations
def test_runs_are_bit_identical(transposed: bool, implementation: str) -> None:
    trained, fixed = case((4, 9, 2, 37, 21, 11), transposed, 3, torch.bfloat16)
    with running(implementation):
        first, second = (results(kernels.lora_linear, trained, **fixed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the order of the branch's products (RunLoRA) ----------------------------------------------------------------------


def test_the_order_with_the_fewest_multiplications_is_taken() -> None:
    """Published crossover of the merged forward: T > in·out/(in + out)."""
    assert [lora_order(t, 4096, 4096, 16, merge=True)[0] for t in (2047, 2048, 2049)] == [False, False, True]
    assert [lora_order(t, 4096, 14336, 16, merge=True)[0] for t in (3185, 3186)] == [False, True]
    assert not lora_order(100_000, 4096, 4096, 16)[0], "merging rounds the update: on request only"
    assert lora_order(8192, 4096, 4096, 16)[1] == "through_rank"
    # One step through dYᵀ·X is cheaper where the rank is large beside the matrix.
    assert lora_order(8192, 64, 64, 256)[1] == "through_weight"


@forms
@pytest.mark.parametrize("tokens, rank, merge, order", [
    (40, 3, False, (False, "through_rank")),
    (40, 3, True, (True, "through_rank")),
    (200, 40, False, (False, "through_weight")),
    (200, 40, True, (True, "through_weight")),
])  # fmt: skip
def test_every_order_gives_the_same(tokens: int, rank: int, merge: bool, order: tuple, transposed: bool) -> None:
    trained, fixed = case((tokens, 0, 0, 13, 9, 1), transposed, rank)
    fixed = {k: v for k, v in fixed.items() if k not in ("dense_rows", "context_rows", "channels")}
    inputs, outputs = trained["a"].shape[1], trained["b"].shape[0]
    assert lora_order(tokens, inputs, outputs, rank, merge=merge) == order
    got = results(kernels.lora_linear, trained, merge=merge, **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    compare(results(reference.lora_linear, double[0], **double[1]), got)


def test_merging_is_the_only_order_that_rounds_the_update() -> None:
    """bf16: an update below half a unit in the last place of the weight is lost by merging, and only by it."""
    x, a = torch.ones(64, 8, dtype=torch.bfloat16), torch.full((1, 8), 1e-3, dtype=torch.bfloat16)
    weight, b = torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(8, 1, dtype=torch.bfloat16)
    # Exact: 8 + 0.008; merged: 1 + 0.001 is 1 in bf16. The sum is rounded to bf16 once more: take the base away by bias.
    bias = torch.full((8,), -8.0, dtype=torch.bfloat16)
    assert kernels.lora_linear(x, weight, bias, a, b).float().mean() == pytest.approx(0.008, rel=1e-2)
    assert kernels.lora_linear(x, weight, bias, a, b, merge=True).float().abs().max() == 0


# --- what is kept, what is refused ---------------------------------------------------------------------------------------


def test_without_a_branch_no_activation_is_kept() -> None:
    trained, fixed = case((3, 5, 2, 7, 3, 4), False, 0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.lora_linear(trained["x"].requires_grad_(), fixed["weight"], channels=None)
    assert not [t.shape for t in kept if t.numel()]


def test_a_trainable_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True))
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, requires_grad=True))


def test_half_a_branch_or_half_a_split_is_refused() -> None:
    with pytest.raises(ValueError, match="both of a and b"):
        kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3))
    with pytest.raises(ValueError, match="all three index lists"):
        kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3), channels=torch.tensor([0]))
