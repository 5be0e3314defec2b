"""NF4Codec gives bitsandbytes' bits: codes, absmax, nested scales, offset, values; whole, from shards, at every boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselora_dist.codecs import NF4Codec
from sparselora_dist.engines.zero3 import FlatShards
from sparselora_dist.sharding.placement import Placement, RowShards
from sparselora_kernels import EncodedWeight
from sparselora_kernels.nf4 import nested_scales
from sparselora_kernels.reference.nf4 import LEVELS
from support.compare import sqnr

# One block; nested blocks of 256 rows, of 85 1/3, of 4, of 1 1/7; a nested block and a bit; nested blocks cut anywhere.
SHAPES = [(1, 64), (300, 64), (90, 192), (7, 320), (9, 4096), (5, 14336), (3, 28672), (3, 64 * 257), (0, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
doubles = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def normal(shape: tuple[int, int], dtype: torch.dtype = torch.float32, std: float = 0.02) -> Tensor:
    return (torch.randn(shape) * std).to(dtype)


def assert_is_bitsandbytes(matrix: Tensor, double_quant: bool) -> None:
    """Everything that is stored, and what it decodes to."""
    codec = NF4Codec(double_quant=double_quant)
    before = matrix.clone()
    encoded = codec.encode(matrix, 0)
    assert torch.equal(matrix, before), "the input was modified"
    assert {name: (part.width, part.dtype) for name, part in codec.parts(matrix.shape[1]).items()} == {
        name: (part.shape[1], part.dtype) for name, part in encoded.items()
    }
    codes, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(encoded["codes"].flatten(), codes.flatten())
    count, scales = matrix.shape[1] // 64, encoded["scales"]
    if double_quant:
        assert torch.equal(scales[:, :count].flatten(), state.absmax)
        nested = scales[:, count:-4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        blocks = torch.arange(matrix.shape[0] * count).view(-1, count) // 256
        for slot in range(nested_scales(count)):
            for row, own in enumerate(blocks):
                if int(own[0]) + slot <= int(own[-1]):
                    assert nested[row, slot] == state.state2.absmax[own[0] + slot]
        assert (scales[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float32) == state.offset).all()
    else:
        assert torch.equal(scales.clone().view(torch.float32).flatten(), state.absmax)
    assert torch.equal(codec.roundtrip(matrix), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@doubles
def test_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    assert_is_bitsandbytes(normal(shape, dtype), double_quant)


def test_more_values_than_are_encoded_at_once() -> None:
    assert_is_bitsandbytes(normal((20, 28672), torch.bfloat16), True)


@doubles
def test_odd_blocks(double_quant: bool) -> None:
    """Zeros, constants, one outlier, values whose squares overflow or vanish, subnormal ones."""
    rows = normal((40, 256), std=1.0)
    rows[1] = 0
    rows[2, :64] = 0
    rows[3], rows[4] = 0.3, -0.3
    rows[5, 7] = 1e6
    for row, size in enumerate((3e38, 1e30, 1e-30, 1e-37, 1e-38, 3e-39, 1e-42, 1.5e-45), start=10):
        rows[row] = (rows[row] / rows[row].abs().max()) * size
    rows[20] = torch.tensor([-0.0, 0.0]).repeat(128)
    matrix = rows if not double_quant else rows[torch.arange(40) != 10]  # The mean of absmax must be finite.
    assert_is_bitsandbytes(matrix, double_quant)
    assert not NF4Codec(double_quant=False).roundtrip(matrix)[1].any()


def neighbours(values: Tensor, steps: int) -> Iterator[Tensor]:
    for direction in (-torch.inf, torch.inf):
        near = values.clone()
        for _ in range(steps + 1):
            yield near
            near = torch.nextafter(near, torch.tensor(direction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_boundaries_between_levels(dtype: torch.dtype) -> None:
    """Every boundary and every level times absmax, and the floats beside them, at every scale."""
    levels = torch.tensor(LEVELS)
    points = torch.cat([(levels[:-1] + levels[1:]) / 2, levels])
    sizes = torch.cat([torch.logspace(-37, 38, 151), torch.rand(100) + 0.5, torch.tensor([1.0, 1e-38, 1e-40, 3e38])])
    rows = []
    for size in sizes:
        for near in neighbours(points * size, 2):
            row = torch.zeros(64)
            row[: len(near)], row[-len(near) - 1 : -1], row[-1] = near, -near, size
            rows.append(row)
    matrix = torch.stack(rows).to(dtype)
    matrix = matrix[torch.isfinite(matrix).all(1)]
    codes, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=False)
    encoded = NF4Codec(double_quant=False).encode(matrix, 0)
    assert torch.equal(encoded["codes"].flatten(), codes.flatten())
    assert torch.equal(encoded["scales"].view(torch.float32).flatten(), state.absmax)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=64, max_size=64))
@settings(max_examples=100, deadline=None)
def test_any_block(values: list[float]) -> None:
    block = torch.tensor([values])
    codes, state = bnb.quantize_4bit(block, quant_type="nf4", compress_statistics=False)
    encoded = NF4Codec(double_quant=False).encode(block, 0)
    assert torch.equal(encoded["codes"].flatten(), codes.flatten())
    assert torch.equal(encoded["scales"].view(torch.float32).flatten(), state.absmax)


# --- from shards ------------------------------------------------------------------------------------------------------


def row_shards(size: int) -> list[Placement]:
    return [RowShards(torch.device("cpu"), rank, size) for rank in range(size)]


def flat_shards(size: int) -> list[Placement]:
    """ZeRO-3's split, without DeepSpeed."""
    ranks: list[Placement] = []
    for rank in range(size):
        placement = FlatShards.__new__(FlatShards)
        Placement.__init__(placement, torch.device("cpu"), rank, size)
        ranks.append(placement)
    return ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("split", [row_shards, flat_shards])
@pytest.mark.parametrize("shape", [(5, 64), (300, 64), (90, 192), (11, 100), (9, 4096), (5, 64 * 257)], ids=str)
@doubles
def test_ranks_encode_what_one_process_does(
    shape: tuple[int, int], split: Callable[[int], list[Placement]], size: int, double_quant: bool
) -> None:
    codec, matrix = NF4Codec(double_quant=double_quant), normal(shape)
    whole = codec.encode(matrix, 0)
    absmax = matrix.new_empty(0)

    def keep(mine: Tensor) -> Tensor:
        nonlocal absmax
        absmax = mine
        return mine

    codec.encode(matrix, 0, keep)
    widths = [part.width for part in codec.parts(shape[1]).values()]
    covered = 0
    for placement in split(size):
        start, stop = placement.rows(shape[0], widths)
        covered = max(covered, stop)
        part = codec.encode(matrix[start:stop], start, lambda mine: absmax)
        for name, rows in part.items():
            own = whole[name][start:stop]
            if name == "codes" or not double_quant:
                assert torch.equal(rows, own)
            else:
                assert_same_scales(rows, own, start, shape[1])
    assert covered == shape[0]


def assert_same_scales(rows: Tensor, own: Tensor, first: int, length: int) -> None:
    """Equal but for nested scales that a row has room for and does not use."""
    count = -(-length // 64)
    for number, (got, expected) in enumerate(zip(rows, own), start=first):
        used = (number * count + count - 1) // 256 - number * count // 256 + 1
        assert torch.equal(got[: count + 4 * used], expected[: count + 4 * used])
        assert torch.equal(got[-4:], expected[-4:])


# --- row lengths that blocks do not divide ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 65, 100, 200, 1000])
@doubles
def test_padded_rows(length: int, double_quant: bool) -> None:
    """As bitsandbytes stores the rows padded with zeros; the padding is not given back."""
    codec, matrix = NF4Codec(double_quant=double_quant), normal((17, length), std=1.0)
    padded = torch.nn.functional.pad(matrix, (0, -length % 64))
    got = codec.roundtrip(matrix)
    assert got.shape == matrix.shape and got.is_contiguous()
    assert torch.equal(got, codec.roundtrip(padded)[:, :length])
    encoded = codec.encode(matrix, 0)
    weight = codec.stored(tuple(encoded.values()), length)
    assert isinstance(weight, EncodedWeight)
    rows = torch.tensor([0, 3, 16])
    assert torch.equal(weight.decode(rows, torch.float32), got[rows])
    # Half the widest gap between levels (0.30 of absmax), and what quantising absmax adds.
    error = (got - matrix).abs().amax(1) / padded.abs().amax(1)
    assert error.max() < 0.16 + 0.05 * double_quant


# --- what cannot be stored, and nothing at all ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (3, 99), (-1, -1)], ids=str)
@doubles
def test_values_that_are_not_finite(value: float, place: tuple[int, int], double_quant: bool) -> None:
    matrix = normal((5000, 100))  # More than is encoded at once.
    matrix[place] = value
    with pytest.raises(ValueError, match=r"rows of 100 values holds NaN or Inf"):
        NF4Codec(double_quant=double_quant).encode(matrix, 0)


@doubles
def test_no_rows(double_quant: bool) -> None:
    """A rank without rows still takes part in the exchange."""
    codec, asked = NF4Codec(double_quant=double_quant), []

    def share(mine: Tensor) -> Tensor:
        asked.append(mine.shape)
        return torch.ones(4, 2)

    parts = codec.encode(torch.empty(0, 128), 4, share)
    assert asked == [(0, 2)] * double_quant
    assert {name: (0, part.width) for name, part in codec.parts(128).items()} == {
        name: tuple(part.shape) for name, part in parts.items()
    }
    assert codec.roundtrip(torch.empty(0, 128)).shape == (0, 128)


# --- how good it is ---------------------------------------------------------------------------------------------------


@doubles
def test_noise_on_normal_weights(double_quant: bool) -> None:
    matrix = normal((256, 4096))
    codes, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=double_quant)
    got = sqnr(matrix, NF4Codec(double_quant=double_quant).roundtrip(matrix))
    assert got == sqnr(matrix, bnb.dequantize_4bit(codes, state))
    assert 20.0 < got < 21.0, got
