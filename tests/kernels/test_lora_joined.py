"""Three LoRA linears in one operation equal their references, one after another, in every output and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.kernel_cases import compare, dtypes, implementations, nf4, results, running, some, split, wide

# Outputs of q, k and v, ranks, and how many of their channels context tokens take; None: whole for all tokens.
OUTPUTS, RANKS = (24, 8, 8), (3, 2, 4)
KEPT: dict[str, tuple[int | None, ...]] = {
    "dense": (None, None, None),
    "qk": (10, 4, None),
    "vo": (None, None, 3),
    "all": (10, 4, 3),
}
tokens = pytest.mark.parametrize("tokens", [(4, 9, 2), (0, 9, 2), (4, 0, 0), (0, 0, 3)], ids=str)


def case(kept: tuple[int | None, ...], counts: tuple[int, int, int], dtype: torch.dtype, width: int = 12) -> Any:
    rows = split(*counts)
    trained = {"x": torch.randn(sum(counts), width, dtype=dtype)}
    for i, (out, rank) in enumerate(zip(OUTPUTS, RANKS)):
        trained[f"a{i}"] = torch.randn(rank, width, dtype=dtype)
        trained[f"b{i}"] = torch.randn(out, rank, dtype=dtype)
    fixed: dict[str, Any] = {
        "weights": [torch.randn(out, width, dtype=dtype) for out in OUTPUTS],
        "biases": [torch.randn(OUTPUTS[0], dtype=dtype), None, torch.randn(OUTPUTS[2], dtype=dtype)],
        "scalings": [0.5, 1.0, 2.0],
        "channels": [None if k is None else some(out, k) for k, out in zip(kept, OUTPUTS)],
    }
    if any(k is not None for k in kept):
        fixed |= {"dense_rows": rows[0], "context_rows": rows[1]}
    return trained, fixed


def joined(operation: Any) -> Any:
    def call(x: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, **fixed: Any) -> Any:
        return operation(x, a=[a0, a1, a2], b=[b0, b1, b2], **fixed)

    return call


def widened(fixed: dict[str, Any]) -> dict[str, Any]:
    return {k: [wide(v) for v in value] if isinstance(value, list) else value for k, value in fixed.items()}


@pytest.mark.parametrize("kept", KEPT)
@tokens
@dtypes
@implementations
def test_equals_reference(kept: str, tokens: tuple[int, int, int], dtype: torch.dtype, implementation: str) -> None:
    trained, fixed = case(KEPT[kept], tokens, dtype)
    with running(implementation):
        got = results(joined(kernels.lora_joined), trained, **fixed)
    double = {name: wide(value) for name, value in trained.items()}
    compare(results(joined(reference.lora_joined), double, **widened(fixed)), got, dtype)


@pytest.mark.parametrize("dense", [0, 4])
@implementations
def test_nf4_equals_the_decoded_weights(dense: int, implementation: str) -> None:
    trained, fixed = case(KEPT["qk"], (dense, 9, 2), torch.float32, 70)
    plain = dict(fixed)
    pairs = [nf4(weight) for weight in fixed["weights"]]
    # One of the three stays plain, as a matrix that quantisation leaves out.
    fixed["weights"] = [pairs[0][0], fixed["weights"][1], pairs[2][0]]
    plain["weights"] = [pairs[0][1], plain["weights"][1], pairs[2][1]]
    with running(implementation):
        got = results(joined(kernels.lora_joined), trained, **fixed)
    compare(results(joined(reference.lora_joined), trained, **plain), got)


def test_an_output_that_nobody_reads() -> None:
    trained, fixed = case(KEPT["all"], (4, 9, 2), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    joined(kernels.lora_joined)(**leaves, **fixed)[1].sum().backward()
    got = {name: leaf.grad for name, leaf in leaves.items()}
    twins = {name: value.detach().clone().requires_grad_() for name, value in trained.items()}
    joined(reference.lora_joined)(**twins, **fixed)[1].sum().backward()
    for name in ("x", "a1", "b1"):
        torch.testing.assert_close(got[name], twins[name].grad)
    assert not got["a0"].any() and not got["b2"].any()


def test_what_is_trainable_or_missing_is_refused() -> None:
    trained, fixed = case(KEPT["all"], (4, 9, 2), torch.float32)
    with pytest.raises(ValueError, match="both lists of rows"):
        joined(kernels.lora_joined)(**trained, **{**fixed, "context_rows": None})
    fixed["weights"][1].requires_grad_()
    with pytest.raises(ValueError, match="freeze the weight"):
        joined(kernels.lora_joined)(**trained, **fixed)
