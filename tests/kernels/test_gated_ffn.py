"""gated_up equals its reference, the masked dense FFN, in every output and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from sparselora_kernels.activations import ACTIVATIONS
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


def up_case(shape: tuple, rank: int, dtype: torch.dtype = torch.float32) -> Any:
    tokens, hidden, neurons = sum(shape[:3]), shape[3], shape[4]
    trained: dict[str, Tensor] = {"x": torch.randn(tokens, hidden, dtype=dtype)}
    fixed: dict[str, Any] = ffn_lists(shape)
    for name in ("gate", "up"):
        fixed[name] = torch.randn(neurons, hidden, dtype=dtype)
        if rank:
            fixed[f"{name}_bias"] = torch.randn(neurons, dtype=dtype)
            trained[f"{name}_low"] = torch.randn(tokens, rank, dtype=dtype)
            trained[f"{name}_b"] = torch.randn(neurons, rank, dtype=dtype)
    return trained, fixed


def check(case: tuple, implementation: str = "torch", **options: Any) -> None:
    trained, fixed = case
    with running(implementation):
        got = results(kernels.gated_up, trained, **fixed, **options)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    expected = results(reference.gated_up, double[0], **double[1], **options)
    compare(expected, got, next(iter(trained.values())).dtype)


@shapes
@ranks
@dtypes
@implementations
def test_up_equals_reference(shape: tuple, rank: int, dtype: torch.dtype, implementation: str) -> None:
    check(up_case(shape, rank, dtype), implementation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@implementations
def test_activations(activation: str, implementation: str) -> None:
    check(up_case((4, 9, 0, 5, 13, 6), 3), implementation, activation=activation)


@pytest.mark.parametrize("dense", [0, 3])
@implementations
def test_nf4_equals_the_decoded_weights(dense: int, implementation: str) -> None:
    trained, fixed = up_case((dense, 6, 1, 70, 96, 11), 3)
    plain = dict(fixed)
    for matrix in ("gate", "up"):
        fixed[matrix], plain[matrix] = nf4(fixed[matrix])
    with running(implementation):
        got = results(kernels.gated_up, trained, **fixed)
    compare(results(reference.gated_up, trained, **plain), got)


@pytest.mark.parametrize("length", [70, 320], ids=["one nested block a row", "nested blocks across rows"])
@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "NF4"])
@implementations
def test_halves_of_one_matrix_are_matrices(length: int, quantised: bool, implementation: str) -> None:
    trained, fixed = up_case((3, 6, 1, length, 96, 11), 3)
    apart = dict(fixed)
    both = torch.cat([fixed["up"], fixed["gate"]])
    stored, values = nf4(both) if quantised else (both, both)
    apart["up"], apart["gate"] = values.chunk(2)
    fixed |= {"up": kernels.rows_of(stored, slice(0, 96)), "gate": kernels.rows_of(stored, slice(96, 192))}
    with running(implementation):
        got = results(kernels.gated_up, trained, **fixed)
    compare(results(reference.gated_up, trained, **apart), got)


@implementations
def test_runs_are_bit_identical(implementation: str) -> None:
    trained, fixed = up_case((4, 9, 2, 21, 37, 11), 3, torch.bfloat16)
    with running(implementation):
        first, second = (results(kernels.gated_up, trained, **fixed) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_the_pre_activations_are_kept() -> None:
    """Neither the input nor any product of the elementwise part: 2 · (D·I + n·k) values."""
    trained, fixed = up_case((3, 5, 2, 4, 16, 6), 0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.gated_up(trained["x"].requires_grad_(), **fixed)
    weights = {fixed["gate"].data_ptr(), fixed["up"].data_ptr()}
    floats = [t for t in kept if t.is_floating_point() and t.data_ptr() not in weights]
    assert sum(t.numel() for t in floats) == 2 * (3 * 16 + 5 * 6)


def test_what_is_trainable_or_half_is_refused() -> None:
    trained, fixed = up_case((3, 5, 2, 4, 16, 6), 3)
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.gated_up(**trained, **{**fixed, "up": fixed["up"].requires_grad_()})
    with pytest.raises(ValueError, match="both of low and b"):
        kernels.gated_up(**{**trained, "up_b": None}, **{**fixed, "up": fixed["up"].detach()})
