"""The kernel of fp8 and fp4, in Triton's interpreter, equals the CPU's decoding to the bit."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import EncodedWeight, rows_of
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.stored import weight_of
from support.kernel_cases import FLOAT_FORMATS, floats

formats = pytest.mark.parametrize("form", FLOAT_FORMATS, ids=str)


def compare(weight: EncodedWeight, channels: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16) -> None:
    expected = weight.decode(channels, dtype)
    with forced_triton():
        got = weight.decode(channels, dtype)
    assert got.dtype == dtype and torch.equal(got, expected)


# One value, odd, whole groups of 16, more than a program decodes.
@pytest.mark.parametrize("shape", [(1, 1), (34, 33), (5, 128), (3, 2090)], ids=str)
@formats
def test_equals_the_cpu(form: tuple, shape: tuple[int, int]) -> None:
    weight = floats(shape, *form)
    last = shape[0] - 1
    some = torch.tensor([32]) if last > 6 else None
    for channels in (torch.tensor([last, 0, last]), torch.empty(0, dtype=torch.int64), some):
        compare(weight, channels)
    compare(weight, torch.tensor([last]), torch.float32)
    compare(weight, torch.tensor([last]), torch.float16)  # Decoded in fp32, then cast.


@formats
def test_rows_inside_a_matrix(form: tuple) -> None:
    """From the middle of channels that share a scale; the parts begin at any byte, their rows further apart than wide."""
    weight = floats((140, 40), *form)
    moved = EncodedWeight([torch.nn.functional.pad(part, (3, 2))[:, 3:-2] for part in weight.parts], weight.layout)
    inner = rows_of(moved, slice(125, 140))
    inner = weight_of(inner.parts, inner.layout)
    expected = weight.decode(torch.arange(125, 140), torch.float32)
    with forced_triton():
        assert torch.equal(inner.decode(None, torch.float32), expected)
        assert torch.equal(inner.decode(torch.tensor([2, 14]), torch.float32), expected[[2, 14]])
