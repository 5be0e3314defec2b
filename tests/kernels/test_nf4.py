"""nf4_rows equals its reference and bitsandbytes, for any rows, whatever block of 256 absmax they share."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from sparselora_kernels import nf4_rows, reference
from sparselora_kernels.nf4 import absmax_map, blocks, nested_scales, nested_slots
from support.kernel_cases import nf4_parts

# (rows, length): one block, a length that 64 does not divide, several rows per nested block, nested blocks that end
# within a row, more than one nested block in a row.
SHAPES = [(1, 64), (5, 100), (9, 192), (7, 64 * 96), (5, 64 * 300)]
DTYPES = [torch.float32, torch.bfloat16]
doubles = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (9, 192), (3, 64 * 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@doubles
def test_equals_reference(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    codes, scales = nf4_parts(shape, double_quant)
    options = {"length": shape[1], "double_quant": double_quant}
    rows = torch.randperm(shape[0])[: shape[0] // 2 + 1].sort().values
    expected = reference.nf4_rows(codes, scales, rows, dtype, absmax_map=absmax_map(codes.device), **options)
    got = nf4_rows(codes, scales, rows, dtype, **options)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@doubles
def test_chosen_rows_are_rows_of_the_whole(shape: tuple[int, int], double_quant: bool) -> None:
    codes, scales = nf4_parts(shape, double_quant)
    options = {"length": shape[1], "double_quant": double_quant}
    whole = nf4_rows(codes, scales, None, torch.float32, **options)
    assert whole.shape == shape
    for rows in (torch.tensor([shape[0] - 1]), torch.arange(shape[0]), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(nf4_rows(codes, scales, rows, torch.float32, **options), whole[rows])
    tail = nf4_rows(codes[1:], scales[1:], None, torch.float32, first=1, **options)
    assert torch.equal(tail, whole[1:])


def test_every_byte_and_every_absmax_code() -> None:
    """All 256 pairs of codes and all 256 absmax codes, against bitsandbytes' own decoding."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)  # 64 rows of 512 values: 8 absmax each
    absmax = torch.arange(512, dtype=torch.int64).remainder(256).to(torch.uint8).view(64, 8)
    nested, offset = torch.tensor([0.75, 0.5]), torch.tensor(1.25)
    own = nested[(torch.arange(64) * 8) // 256].view(64, 1)
    scales = torch.cat([absmax, own.view(torch.uint8).view(64, 4), offset.view(1).view(torch.uint8).repeat(64, 1)], 1)
    got = nf4_rows(codes, scales, None, torch.float32, length=512, double_quant=True)
    inner = bnb.QuantState(absmax=nested, code=absmax_map(codes.device), blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        absmax=absmax.view(-1), shape=torch.Size((64, 512)), dtype=torch.float32, blocksize=64, quant_type="nf4",
        code=bnb.get_4bit_type("nf4", device="cpu"), offset=offset, state2=inner,
    )  # fmt: skip
    assert torch.equal(got, bnb.dequantize_4bit(codes.view(-1, 1), state))


def test_a_row_has_room_for_every_nested_block_it_can_touch() -> None:
    for count in range(1, 700):
        slots = nested_slots(torch.arange(256), count)
        assert slots.min() == 0 and int(slots.max()) + 1 == nested_scales(count), count
    assert [blocks(n) for n in (1, 64, 65)] == [1, 1, 2]
