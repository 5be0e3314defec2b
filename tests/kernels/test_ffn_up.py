"""ffn_up equals its reference, of the whole product what is kept, in its output and every gradient."""

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
    tokens, hidden, neurons = sum(shape[:3]), shape[3], shape[4]
    trained = {"x": torch.randn(tokens, hidden, dtype=dtype)}
    fixed: dict[str, Any] = {**ffn_lists(shape), "weight": torch.randn(neurons, hidden, dtype=dtype)}
    if rank:
        fixed["bias"] = torch.randn(neurons, dtype=dtype)
        trained["low"] = torch.randn(tokens, rank, dtype=dtype)
        trained["b"] = torch.randn(neurons, rank, dtype=dtype)
    return trained, fixed


@shapes
@ranks
@dtypes
@implementations
def test_equals_reference(shape: tuple, rank: int, dtype: torch.dtype, implementation: str) -> None:
    trained, fixed = case(shape, rank, dtype)
    with running(implementation):
        got = results(kernels.ffn_up, trained, **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    compare(results(reference.ffn_up, double[0], **double[1]), got, dtype)


@pytest.mark.parametrize("dense", [0, 3])
def test_nf4_equals_the_decoded_weight(dense: int) -> None:
    trained, fixed = case((dense, 6, 1, 70, 96, 11), 3)
    plain = dict(fixed)
    fixed["weight"], plain["weight"] = nf4(fixed["weight"])
    compare(results(reference.ffn_up, trained, **plain), results(kernels.ffn_up, trained, **fixed))


def test_channels_are_asked_for_after_the_dense_product() -> None:
    trained, fixed = case((3, 5, 2, 4, 16, 6), 3)
    channels = fixed["channels"]
    expected = results(kernels.ffn_up, trained, **fixed)
    compare(expected, results(kernels.ffn_up, trained, **{**fixed, "channels": lambda: channels}))


def test_what_is_trainable_or_half_is_refused() -> None:
    trained, fixed = case((3, 5, 2, 4, 16, 6), 3)
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.ffn_up(**trained, **{**fixed, "weight": fixed["weight"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="both of low and b"):
        kernels.ffn_up(**{**trained, "b": None}, **fixed)
