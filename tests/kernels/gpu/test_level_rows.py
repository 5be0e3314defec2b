"""The kernel of few levels, in Triton's interpreter, equals the CPU's decoding to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_kernels import level_rows
from sparselora_kernels.backend import forced_triton
from support.kernel_cases import LEVEL_RULES, level_parts

# (rows, length): a group, lengths that 128 and 8 do not divide, whole bytes, a row of more groups than a program decodes.
SHAPES = [(1, 128), (5, 100), (4, 264), (3, 128 * 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(
    parts: tuple[Tensor, Tensor, Tensor | None], channels: Tensor | None, dtype: torch.dtype, **options: int
) -> None:
    expected = level_rows(*parts, channels, dtype, **options)
    with forced_triton():
        got = level_rows(*parts, channels, dtype, **options)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rule", "bits"), LEVEL_RULES, ids=str)
def test_equals_the_cpu(shape: tuple[int, int], rule: int, bits: int) -> None:
    parts = level_parts(shape, rule, bits)
    options = {"length": shape[1], "rule": rule, "bits": bits}
    chosen = torch.randint(shape[0], (shape[0] + 1,))
    for dtype in DTYPES:
        for channels in (None, chosen, chosen[:0]):
            compare(parts, channels, dtype, **options)


@pytest.mark.parametrize(("rule", "bits"), LEVEL_RULES[::3], ids=str)
def test_parts_of_a_larger_buffer(rule: int, bits: int) -> None:
    """Gathered parameters may begin at any byte, and rows may be further apart than they are wide."""
    codes, params, columns = level_parts((5, 192), rule, bits)
    options = {"length": 192, "rule": rule, "bits": bits}
    wide = [torch.nn.functional.pad(part, (3, 2))[:, 3:-2] for part in (codes, params)]
    assert wide[0].stride(0) > codes.stride(0)
    expected = level_rows(codes, params, columns, torch.tensor([4, 1]), torch.float32, **options)
    assert torch.equal(level_rows(*wide, columns, torch.tensor([4, 1]), torch.float32, **options), expected)
    compare((*wide, columns), torch.tensor([4, 1]), torch.float32, **options)
