"""split_rows and join_rows equal plain indexing, and each is the other's backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.compare import assert_close

SHAPES = [(3, 5, 2, 7), (1, 0, 0, 1), (0, 5, 2, 3), (5, 0, 2, 3), (0, 0, 4, 3), (0, 0, 0, 3), (17, 31, 5, 13)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def partition(dense: int, context: int, padding: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(dense + context + padding)
    return order[:dense].sort().values, order[dense : dense + context].sort().values


def gradient_of(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) + 1 for y in outputs])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_equals_reference(shape: tuple, dtype: torch.dtype) -> None:
    *counts, width = shape
    rows = partition(*counts)
    x = torch.randn(sum(counts), width, dtype=dtype)
    results = []
    for op in (reference.split_rows, kernels.split_rows):
        leaf = x.clone().requires_grad_()
        parts = op(leaf, *rows)
        gradient_of(*parts)
        results.append([*parts, leaf.grad])
    for name, a, b in zip(("dense", "context", "grad x"), *results):
        assert_close(name, a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_join_equals_reference(shape: tuple, dtype: torch.dtype) -> None:
    dense, context, padding, width = shape
    rows = partition(dense, context, padding)
    parts = torch.randn(dense, width, dtype=dtype), torch.randn(context, width, dtype=dtype)
    results = []
    for op in (reference.join_rows, kernels.join_rows):
        leaves = [part.clone().requires_grad_() for part in parts]
        y = op(*leaves, *rows, dense + context + padding)
        gradient_of(y)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for name, a, b in zip(("y", "grad dense", "grad context"), *results):
        assert_close(name, a, b, rtol=0, atol=0)


def test_join_undoes_split_except_at_padding() -> None:
    dense, context = partition(4, 6, 3)
    x = torch.randn(13, 5)
    y = kernels.join_rows(*kernels.split_rows(x, dense, context), dense, context, 13)
    real = torch.cat([dense, context])
    assert torch.equal(y[real], x[real])
    assert int(y.any(1).sum()) == 10


def test_an_unused_part_has_a_zero_gradient() -> None:
    """A loss that reads the dense tokens only still gives a gradient of the whole shape."""
    dense, context = partition(2, 3, 1)
    x = torch.randn(6, 4, requires_grad=True)
    kernels.split_rows(x, dense, context)[0].sum().backward()
    expected = torch.zeros(6, 4)
    expected[dense] = 1
    assert torch.equal(x.grad, expected)


def test_gradcheck() -> None:
    dense, context = partition(2, 3, 1)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kernels.split_rows(x, dense, context), (x,))
    parts = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    assert torch.autograd.gradcheck(lambda a, b: kernels.join_rows(a, b, dense, context, 6), parts)
