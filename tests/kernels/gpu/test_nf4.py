"""The NF4 kernel, in Triton's interpreter, equals bitsandbytes to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_kernels import nf4_rows
from sparselora_kernels.backend import forced_triton
from support.kernel_cases import nf4_parts

# (rows, length): one block, a length that 64 does not divide, several rows per nested block, nested blocks that end
# within a row, a row of more absmax than a program decodes, more than one nested block in a row.
SHAPES = [(1, 64), (5, 100), (9, 192), (7, 64 * 96), (5, 64 * 33), (3, 64 * 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
doubles = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def compare(codes: Tensor, scales: Tensor, channels: Tensor | None, dtype: torch.dtype, **options: int) -> None:
    expected = nf4_rows(codes, scales, channels, dtype, **options)
    with forced_triton():
        got = nf4_rows(codes, scales, channels, dtype, **options)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@doubles
def test_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    codes, scales = nf4_parts(shape, double_quant)
    options = {"length": shape[1], "double_quant": double_quant}
    chosen = torch.randperm(shape[0])[: shape[0] // 2 + 1].sort().values
    for channels in (None, chosen, torch.arange(shape[0]), torch.tensor([shape[0] - 1]), chosen[:0]):
        compare(codes, scales, channels, dtype, **options)


@doubles
def test_rows_from_the_middle_of_a_matrix(double_quant: bool) -> None:
    """A shard that begins in the middle of a nested block."""
    codes, scales = nf4_parts((9, 64 * 96), double_quant)
    options = {"length": 64 * 96, "double_quant": double_quant, "first": 4}
    compare(codes[4:], scales[4:], None, torch.bfloat16, **options)
    compare(codes[4:], scales[4:], torch.tensor([0, 3]), torch.bfloat16, **options)


@doubles
def test_parts_of_a_larger_buffer(double_quant: bool) -> None:
    """Gathered parameters may begin at any byte, and rows may be further apart than they are wide."""
    codes, scales = nf4_parts((5, 192), double_quant)
    options = {"length": 192, "double_quant": double_quant}
    wide_codes, wide_scales = (torch.nn.functional.pad(part, (3, 2))[:, 3:-2] for part in (codes, scales))
    assert wide_codes.stride(0) > codes.stride(0)
    with forced_triton():
        got = nf4_rows(wide_codes, wide_scales, torch.tensor([1, 4]), torch.float32, **options)
    assert torch.equal(got, nf4_rows(codes, scales, torch.tensor([1, 4]), torch.float32, **options))


def test_every_byte_and_every_absmax_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    absmax = torch.arange(512).remainder(256).to(torch.uint8).view(64, 8)
    nested = torch.tensor([0.75, 0.3])[(torch.arange(64) * 8) // 256].view(64, 1)
    offset = torch.full((64, 1), 1.2345)
    scales = torch.cat([absmax, nested.view(torch.uint8), offset.view(torch.uint8)], 1)
    for dtype in DTYPES:
        compare(codes, scales, None, dtype, length=512, double_quant=True)
