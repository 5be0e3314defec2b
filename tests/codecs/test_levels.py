"""LevelsCodec: how exact each format is, what it stores, that rows are encoded alone, and what cannot be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_dist.codecs import LevelsCodec, codec_named, grouped
from sparselora_dist.codecs.levels import LevelFormat
from sparselora_kernels.levels import unpack_params
from support.compare import sqnr

# Format, bits, bits a weight where 128 divides the rows, and the SQNR on normal values that it must reach, dB.
FORMATS: list[tuple[LevelFormat, int, float, float]] = [
    ("bcq", 2, 2.25, 9.3),
    ("bcq", 3, 3.375, 14.4),
    ("bcq", 4, 4.5, 19.5),
    ("shiftadd", 2, 2.25, 9.3),
    ("shiftadd", 3, 3.375, 14.4),
    ("shiftadd", 4, 4.5, 19.5),
    ("hqq", 2, 2.25, 6.1),
    ("hqq", 3, 3.25, 13.6),
    ("hqq", 4, 4.25, 20.2),
]
CODECS = [LevelsCodec(name, bits) for name, bits, *_ in FORMATS]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.mark)


@pytest.mark.parametrize(("name", "bits", "size", "least"), FORMATS, ids=str)
def test_noise_and_bytes(name: LevelFormat, bits: int, size: float, least: float) -> None:
    codec = codec_named(name, bits)
    matrix = torch.randn(128, 2048) * 0.02
    encoded = codec.encode(matrix, 0)
    parts = codec.parts(2048)
    assert {name: (part.width, part.dtype) for name, part in parts.items()} == {
        name: (part.shape[1], part.dtype) for name, part in encoded.items()
    }
    assert sum(part.nbytes for part in encoded.values()) == sum(part.bytes(128) for part in parts.values())
    assert sum(part.nbytes for part in encoded.values()) * 8 == size * matrix.numel()
    got = sqnr(matrix, codec.roundtrip(matrix))
    assert least <= got < least + 0.4, got


def test_bytes_of_billm() -> None:
    """Two bits of code, seven numbers a group, and a bit for each column of the matrix."""
    parts = LevelsCodec("billm", 2).parts(4096)
    assert [part.every for part in parts.values()] == [1, 1, 0]
    assert sum(part.bytes(1000) for part in parts.values()) * 8 == 2.875 * 4096 * 1000 + 4096


@codecs
def test_rows_are_encoded_alone(codec: LevelsCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes for every number of ranks, from any row on, with more threads, and a row at once."""
    matrix = torch.randn(23, 300) * torch.logspace(-3, 1, 23)[:, None]
    whole = codec.encode(matrix, 0)
    for size in (2, 3, 7):
        first = 0
        for rows in matrix.tensor_split(size):
            for name, part in codec.encode(rows, first).items():
                assert torch.equal(part, whole[name][first : first + len(rows)]), (size, first, name)
            first += len(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        parallel = codec.encode(matrix.repeat(30, 1), 0)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(grouped, "_CPU_CHUNK", 1)
    single = codec.encode(matrix, 0)
    for name, part in whole.items():
        assert torch.equal(parallel[name], part.repeat(30, 1)) and torch.equal(single[name], part)


@codecs
@pytest.mark.parametrize("length", [1, 100, 300])
def test_rows_that_groups_do_not_divide(codec: LevelsCodec, length: int) -> None:
    """What is left of a row is a smaller group; it is as exact as the others."""
    matrix = torch.randn(40, length)
    weight = codec.whole(matrix)
    got = weight.decode(None, torch.float32)
    assert got.shape == matrix.shape
    left = slice(length // 128 * 128, length)
    assert sqnr(matrix[:, left], got[:, left]) > sqnr(matrix, got) - 0.2
    rows = torch.tensor([3, 0, 39])
    assert torch.equal(weight.decode(rows, torch.float32), got[rows])
    assert all(part.shape == (0, codec.parts(length)[name].width) for name, part in codec.encode(matrix[:0], 0).items())


@codecs
def test_rows_without_a_spread(codec: LevelsCodec) -> None:
    zeros, constant = torch.zeros(2, 300), torch.tensor([[0.3], [-7.0]]).expand(2, 300)
    assert not codec.roundtrip(zeros).any()
    error = (codec.roundtrip(constant) - constant).abs() / constant.abs()
    # fp16's own, or that of a sum of three powers of two.
    assert error.max() < (1 / 27 if codec.format == "shiftadd" else 2**-10)
    # Half a row is zero, and one value is not.
    half = torch.zeros(1, 256)
    half[0, 200] = 0.5
    assert (codec.roundtrip(half) - half).abs().max() < (0.02 if codec.format == "shiftadd" else 2**-10)


@codecs
def test_small_values(codec: LevelsCodec) -> None:
    """Numbers are subnormal in fp16 there. Values of 1e-6 are stored nearly as well as others; far smaller ones are zero."""
    matrix = torch.randn(64, 256)
    usual, small = (sqnr(matrix * size, codec.roundtrip(matrix * size)) for size in (0.02, 1e-6))
    assert small > usual - 0.3
    assert sqnr(matrix * 1e-7, codec.roundtrip(matrix * 1e-7)) > 5
    assert (codec.roundtrip(matrix * 1e-10)).abs().max() < 2**-22
    for dtype in (torch.bfloat16, torch.float16):
        assert codec.roundtrip(matrix.to(dtype)).isfinite().all()


@codecs
def test_values_far_from_zero(codec: LevelsCodec) -> None:
    """An offset a hundred times the spread costs no more than it must."""
    matrix = 1 + torch.randn(64, 256) * 0.01
    assert sqnr(matrix, codec.roundtrip(matrix)) > 40


@codecs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
def test_values_that_cannot_be_stored(codec: LevelsCodec, value: float) -> None:
    matrix = torch.randn(7, 300)
    matrix[5, 299] = value
    words = "holds some so large" if value == 3e38 else "holds NaN or Inf"
    with pytest.raises(ValueError, match=f"rows of 300 values {words}.*{codec.format}"):
        codec.encode(matrix, 0)


def test_what_is_not_made() -> None:
    with pytest.raises(ValueError, match=r"billm needs data.*sparselora-dist quantize"):
        LevelsCodec("billm", 2).encode(torch.randn(2, 128), 0)
    with pytest.raises(ValueError, match="codes of 2 bits, not of 4"):
        LevelsCodec("billm", 4)
    assert len({codec.mark for codec in CODECS}) == len({codec.name for codec in CODECS}) == len(CODECS)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_of_shiftadd(bits: int) -> None:
    """At most three powers of two, plus or minus: as many digits has the shortest signed form of the number."""
    params = unpack_params(LevelsCodec("shiftadd", bits).encode(torch.randn(20, 300), 0)["params"], bits)
    whole: Tensor = (params.abs().double() * 2**24).long()
    # The digits of the shortest signed form are the bits in which n and 3n differ.
    assert max(bin(n ^ 3 * n).count("1") for n in whole.flatten().tolist()) <= 3
