"""split_linear equals two plain products, and decodes an encoded weight once for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import EncodedWeight, reference
from support.compare import assert_close

# (dense tokens, context tokens, channels, width, kept)
SHAPES = [(4, 5, 7, 3, 4), (1, 1, 1, 1, 1), (33, 9, 65, 17, 1), (3, 19, 21, 13, 21), (0, 6, 9, 5, 4), (6, 0, 9, 5, 4)]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
biases = pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])


def inputs(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype) -> list[Tensor | None]:
    dense, context, channels, width, kept = shape
    x_dense = torch.randn(dense, channels if transposed else width, dtype=dtype)
    x_context = torch.randn(context, kept if transposed else width, dtype=dtype)
    weight = torch.randn(channels, width, dtype=dtype)
    bias = torch.randn(width if transposed else channels, dtype=dtype) if with_bias else None
    return [x_dense, x_context, weight, bias, torch.randperm(channels)[:kept].sort().values]


def outputs(op, x_dense: Tensor, x_context: Tensor, *rest, transposed: bool) -> list[Tensor]:
    """Both results, and the gradients of both inputs for fixed output gradients."""
    x = [t.clone().requires_grad_() for t in (x_dense, x_context)]
    y = op(*x, *rest, transposed=transposed)
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in y).backward()
    return [*y, *(t.grad for t in x)]


@cases
@forms
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_reference(shape: tuple, transposed: bool, with_bias: bool, dtype: torch.dtype) -> None:
    given = inputs(shape, transposed, with_bias, dtype)
    got = outputs(kernels.split_linear, *given, transposed=transposed)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    expected = outputs(reference.split_linear, *wide, transposed=transposed)
    for name, a, b in zip(("y dense", "y context", "grad dense", "grad context"), expected, got):
        assert b.dtype == dtype
        assert_close(name, a, b)


@forms
@pytest.mark.parametrize("dense", [3, 0])
def test_an_encoded_weight_is_decoded_once_a_pass(transposed: bool, dense: int) -> None:
    x_dense, x_context, weight, _, channels = inputs((dense, 5, 9, 6, 4), transposed, False, torch.float32)
    decoded: list[int] = []

    def decode(parts: tuple[Tensor, ...], rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        decoded.append(weight.shape[0] if rows is None else rows.numel())
        return (parts[0] if rows is None else parts[0][rows]).to(dtype) / 2

    encoded = EncodedWeight(((weight * 2).double(),), decode)
    got = outputs(kernels.split_linear, x_dense, x_context, encoded, None, channels, transposed=transposed)
    # Everything where there are dense tokens, the kept rows alone where there are none; forward and backward.
    assert decoded == [9 if dense else 4] * 2
    plain = outputs(kernels.split_linear, x_dense, x_context, weight, None, channels, transposed=transposed)
    for a, b in zip(plain, got):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_trainable_weights_are_refused(trained: str) -> None:
    x_dense, x_context, weight, bias, channels = inputs((2, 3, 5, 4, 2), False, True, torch.float32)
    (weight if trained == "weight" else bias).requires_grad_()
    with pytest.raises(ValueError, match="split_linear computes no weight gradient"):
        kernels.split_linear(x_dense, x_context, weight, bias, channels)
