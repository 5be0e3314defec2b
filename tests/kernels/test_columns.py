"""Columns of rows by index equal plain indexing, bit for bit where nothing is added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_kernels.columns import gather, scatter
from support.kernel_cases import implementations, running, some

# (tokens, chosen tokens, channels, kept): odd sizes, one of everything, several tiles each way, none.
SHAPES = [(5, 3, 7, 4), (1, 1, 1, 1), (41, 33, 300, 150), (40, 40, 144, 144), (6, 0, 9, 4), (6, 3, 9, 0)]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def case(shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tensor (T, C), another (n, k), and the rows and columns of the first that the second is."""
    tokens, chosen, channels, kept = shape
    whole, part = torch.randn(tokens, channels).to(dtype), torch.randn(chosen, kept).to(dtype)
    return whole, part, some(tokens, chosen), some(channels, kept)


@cases
@dtypes
@implementations
def test_gather(shape: tuple, dtype: torch.dtype, implementation: str) -> None:
    whole, _, rows, channels = case(shape, dtype)
    with running(implementation):
        assert torch.equal(gather(whole, rows, channels), whole[rows[:, None], channels])


@cases
@dtypes
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@implementations
def test_scatter(shape: tuple, dtype: torch.dtype, accumulate: bool, implementation: str) -> None:
    whole, part, rows, channels = case(shape, dtype)
    expected = whole.clone()
    expected[rows[:, None], channels] = part + whole[rows[:, None], channels] if accumulate else part
    with running(implementation):
        assert scatter(part, rows, channels, whole, accumulate=accumulate) is whole
    assert torch.equal(whole, expected)


@implementations
def test_views_are_read_and_written_as_they_lie(implementation: str) -> None:
    """Rows that lie apart on both sides; a transposed tensor is read too, and not written by the kernel."""
    whole, part, rows, channels = case((9, 5, 40, 11), torch.float32)
    wide, transposed = torch.zeros(9, 100), whole.t().contiguous().t()
    with running(implementation):
        assert torch.equal(gather(transposed, rows, channels), whole[rows[:, None], channels])
        scatter(torch.cat([part, part], 1)[:, :11], rows, channels, wide[:, 20:60])
    expected = torch.zeros(9, 100)
    expected[rows[:, None], channels + 20] = part
    assert torch.equal(wide, expected)
    with running("triton"), pytest.raises(ValueError, match="contiguous"):
        scatter(part, rows, channels, transposed)
