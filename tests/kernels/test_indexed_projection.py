"""indexed_projection equals its reference: whole for dense tokens, kept channels for context tokens, zero elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.compare import assert_close

# (dense, context, padding tokens, channels, width, kept)
SHAPES = [(3, 5, 2, 7, 3, 4), (1, 1, 0, 1, 1, 1), (4, 9, 3, 13, 5, 1), (4, 9, 3, 13, 5, 13)]
NO_TOKENS = [(4, 0, 1, 7, 5, 3), (0, 4, 1, 7, 5, 3), (0, 0, 3, 7, 5, 3), (0, 0, 0, 7, 5, 3)]
forms = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])


def inputs(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    dense, context, padding, channels, width, kept = shape
    tokens = dense + context + padding
    order = torch.randperm(tokens)
    x = torch.randn(tokens, channels if transposed else width, dtype=dtype)
    weight = torch.randn(channels, width, dtype=dtype)
    bias = torch.randn(width if transposed else channels, dtype=dtype) if with_bias else None
    rows = order[:dense].sort().values, order[dense : dense + context].sort().values
    return [x, weight, bias, *rows, torch.randperm(channels)[:kept].sort().values]


def outputs(op, x: Tensor, *args: Any, transposed: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = op(x, *args, transposed=transposed)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype))
    return [y, x.grad]


@pytest.mark.parametrize("shape", SHAPES + NO_TOKENS, ids=str)
@forms
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_reference(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias, *rest = inputs(shape, transposed, with_bias, dtype)
    got = outputs(kernels.indexed_projection, x, weight, bias, *rest, transposed=transposed)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = outputs(reference.indexed_projection, *wide, *rest, transposed=transposed)
    for name, a, b in zip(("y", "grad x"), expected, got):
        assert b.dtype == dtype
        assert_close(name, a, b)


@forms
def test_all_channels_is_the_dense_product(transposed: bool) -> None:
    args = inputs((4, 9, 0, 13, 5, 13), transposed, True)
    x, weight, bias = args[:3]
    dense = torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
    assert_close("y", dense, kernels.indexed_projection(*args, transposed=transposed))


@forms
def test_gradcheck(transposed: bool) -> None:
    x, *rest = inputs((2, 3, 1, 6, 3, 2), transposed, True, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: kernels.indexed_projection(x, *rest, transposed=transposed), (x.requires_grad_(),)
    )


@forms
def test_runs_are_bit_identical(transposed: bool) -> None:
    args = inputs((14, 19, 3, 33, 17, 9), transposed, True)
    runs = [outputs(kernels.indexed_projection, *args, transposed=transposed) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@forms
def test_padding_is_never_read(transposed: bool) -> None:
    """What lies in padding, NaN included, reaches neither the result nor a gradient."""
    x, *rest = inputs((3, 5, 4, 7, 3, 4), transposed, True)
    padding = torch.ones(len(x), dtype=torch.bool)
    padding[rest[2]] = padding[rest[3]] = False
    x[padding] = float("nan")
    y, grad = outputs(kernels.indexed_projection, x, *rest, transposed=transposed)
    assert not y[padding].any() and not grad[padding].any()
    assert y.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_trainable_weight_or_bias_is_refused(part: str) -> None:
    args = inputs(SHAPES[0], False, True)
    args[1 if part == "weight" else 2].requires_grad_()
    with pytest.raises(ValueError, match="freeze"):
        kernels.indexed_projection(*args)
