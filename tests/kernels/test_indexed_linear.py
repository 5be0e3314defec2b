"""indexed_linear equals its reference: the whole product, with what is not kept left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.compare import assert_close

# (tokens, channels, width, kept): odd sizes, one of everything, one kept, all kept, no tokens.
SHAPES = [(5, 7, 3, 4), (1, 1, 1, 1), (33, 65, 17, 1), (19, 21, 13, 21), (0, 9, 5, 4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
biases = pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])


def inputs(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens, channels, width, kept = shape
    x = torch.randn(tokens, kept if transposed else width, dtype=dtype)
    weight = torch.randn(channels, width, dtype=dtype)
    bias = torch.randn(width if transposed else channels, dtype=dtype) if with_bias else None
    return x, weight, bias, torch.randperm(channels)[:kept].sort().values


def outputs(op, x: Tensor, weight: Tensor, bias: Tensor | None, channels: Tensor | None, **options) -> list[Tensor]:
    """Result, and the gradients of x and weight for a fixed output gradient."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = op(x, weight, bias, channels, **options)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype))
    return [y, x.grad, weight.grad]


@cases
@forms
@biases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight, bias, channels = inputs(shape, transposed, with_bias, dtype)
    got = outputs(kernels.indexed_linear, x, weight, bias, channels, transposed=transposed)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = outputs(reference.indexed_linear, *wide, channels, transposed=transposed)
    for name, a, b in zip(("y", "grad x", "grad weight"), expected, got):
        assert b.dtype == dtype
        assert_close(name, a, b)


@forms
@biases
def test_all_channels_is_the_dense_product(transposed: bool, with_bias: bool) -> None:
    x, weight, bias, channels = inputs((9, 11, 7, 11), transposed, with_bias, torch.float32)
    dense = torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
    for indices in (channels, None):
        assert_close("y", dense, kernels.indexed_linear(x, weight, bias, indices, transposed=transposed))


@forms
def test_gradcheck(transposed: bool) -> None:
    x, weight, bias, channels = inputs((4, 6, 3, 2), transposed, True, torch.float64)

    def op(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.indexed_linear(x, weight, bias, channels, transposed=transposed)

    assert torch.autograd.gradcheck(op, (x.requires_grad_(), weight.requires_grad_()))


@forms
def test_runs_are_bit_identical(transposed: bool) -> None:
    x, weight, bias, channels = inputs((33, 65, 17, 20), transposed, True, torch.float32)
    runs = [outputs(kernels.indexed_linear, x, weight, bias, channels, transposed=transposed) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_dropped_rows_get_a_zero_weight_gradient() -> None:
    x, weight, _, _ = inputs((5, 6, 3, 2), False, False, torch.float32)
    grad = outputs(kernels.indexed_linear, x, weight, None, torch.tensor([1, 4]))[2]
    assert grad[[1, 4]].abs().min() > 0
    assert not grad[[0, 2, 3, 5]].any()


def test_a_frozen_weight_keeps_no_activation() -> None:
    x, weight, _, channels = inputs((5, 6, 3, 2), False, False, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.indexed_linear(x.requires_grad_(), weight, None, channels)
    assert {t.data_ptr() for t in kept} == {weight.data_ptr(), channels.data_ptr()}


def test_a_trainable_bias_is_refused() -> None:
    x, weight, bias, channels = inputs((5, 6, 3, 2), False, True, torch.float32)
    with pytest.raises(ValueError, match="bias"):
        kernels.indexed_linear(x, weight, bias.requires_grad_(), channels)


@forms
def test_the_input_decides_the_dtype(transposed: bool) -> None:
    x, weight, bias, channels = inputs((5, 6, 3, 2), transposed, True, torch.float32)
    got = outputs(kernels.indexed_linear, x.bfloat16(), weight, bias, channels, transposed=transposed)
    expected = outputs(reference.indexed_linear, x, weight, bias, channels, transposed=transposed)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for name, a, b in zip(("y", "grad x", "grad weight"), expected, got):
        assert_close(name, a, b, rtol=3e-2, atol=3e-2)
