"""ffn_down equals its reference, the product with dropped neurons set to zero, in every output and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.kernel_cases import (
    compare,
    dtypes,
    ffn_lists,
    implementations,
    nf4,
    ranks,
    results,
    running,
    shapes,
    wide,
)


def case(shape: tuple, rank: int, dtype: torch.dtype = torch.float32) -> Any:
    dense, context, _, hidden, neurons, kept = shape
    trained = {
        "h_dense": torch.randn(dense, neurons, dtype=dtype),
        "h_context": torch.randn(context, kept, dtype=dtype),
    }
    fixed: dict[str, Any] = {**ffn_lists(shape), "weight": torch.randn(neurons, hidden, dtype=dtype)}
    fixed["tokens"] = sum(shape[:3])
    if rank:
        fixed["bias"] = torch.randn(hidden, dtype=dtype)
        trained["low_dense"] = torch.randn(dense, rank, dtype=dtype)
        trained["low_context"] = torch.randn(context, rank, dtype=dtype)
        trained["b"] = torch.randn(hidden, rank, dtype=dtype)
    return trained, fixed


@shapes
@ranks
@dtypes
@implementations
def test_equals_reference(shape: tuple, rank: int, dtype: torch.dtype, implementation: str) -> None:
    trained, fixed = case(shape, rank, dtype)
    with running(implementation):
        got = results(kernels.ffn_down, trained, **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    compare(results(reference.ffn_down, double[0], **double[1]), got, dtype)


@pytest.mark.parametrize("dense", [0, 3])
@implementations
def test_nf4_equals_the_decoded_weight(dense: int, implementation: str) -> None:
    trained, fixed = case((dense, 6, 1, 70, 96, 11), 3)
    plain = dict(fixed)
    fixed["weight"], plain["weight"] = nf4(fixed["weight"])
    with running(implementation):
        got = results(kernels.ffn_down, trained, **fixed)
    compare(results(reference.ffn_down, trained, **plain), got)


@implementations
def test_runs_are_bit_identical(implementation: str) -> None:
    trained, fixed = case((4, 9, 2, 21, 37, 11), 3, torch.bfloat16)
    with running(implementation):
        first, second = (results(kernels.ffn_down, trained, **fixed) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_trainable_or_half_is_refused() -> None:
    trained, fixed = case((3, 5, 2, 4, 16, 6), 3)
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.ffn_down(**trained, **{**fixed, "weight": fixed["weight"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="all of low_dense"):
        kernels.ffn_down(**{**trained, "b": None}, **fixed)
