"""level_rows equals its reference for any rows."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import EncodedWeight, level_layout, level_rows, reference, rows_of
from sparselora_kernels.levels import SIGNS, unpack_params, widths
from sparselora_kernels.stored import weight_of
from support.kernel_cases import LEVEL_RULES, level_parts

# (rows, length): a group, one value, a group and a bit, bytes cut, more rows than are decoded at once.
SHAPES = [(1, 128), (2, 1), (5, 129), (3, 300), (20, 64 * 96)]
rules = pytest.mark.parametrize(("rule", "bits"), LEVEL_RULES, ids=str)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@rules
def test_equals_reference(shape: tuple[int, int], rule: int, bits: int) -> None:
    parts = level_parts(shape, rule, bits)
    rows = torch.randint(shape[0], (shape[0] + 1,))  # Repeated ones too, in any order.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = reference.level_rows(*parts, rows, dtype, length=shape[1], rule=rule, bits=bits)
        got = level_rows(*parts, rows, dtype, length=shape[1], rule=rule, bits=bits)
        assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@rules
def test_chosen_rows_are_rows_of_the_whole(shape: tuple[int, int], rule: int, bits: int) -> None:
    given = [part for part in level_parts(shape, rule, bits) if part is not None]
    stored = EncodedWeight(given, level_layout(shape[1], rule, bits))
    assert [part.shape[1] for part in given] == list(widths(shape[1], rule, bits))
    whole = stored.decode(None, torch.float32)
    assert whole.shape == shape
    for rows in (torch.tensor([shape[0] - 1, 0, 0]), torch.arange(shape[0]), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(stored.decode(rows, torch.float32), whole[rows])
        assert torch.equal(stored.decode(rows, torch.float64), whole[rows].double())
    some = rows_of(stored, slice(1, shape[0]))
    tail = weight_of(some.parts, some.layout)
    assert tail.first == 1 and torch.equal(tail.decode(None, torch.float32), whole[1:])


def test_numbers_at_an_odd_address() -> None:
    """A gathered parameter may begin at any byte of its buffer."""
    codes, params, _ = level_parts((4, 256), SIGNS, 3)
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), params.flatten()])[1:].view(params.shape)
    assert odd.data_ptr() % 2 and torch.equal(unpack_params(odd, 3), unpack_params(params, 3))
    options = {"length": 256, "rule": SIGNS, "bits": 3}
    got = level_rows(codes, odd, None, None, torch.float32, **options)
    assert torch.equal(got, level_rows(codes, params, None, None, torch.float32, **options))
