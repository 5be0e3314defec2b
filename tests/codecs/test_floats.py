"""FloatsCodec: fp8 made row by row, as many bytes as the formula says; nvfp4 and mxfp4 only have a layout."""

from __future__ import annotations

import pytest
import torch

from sparselora_dist.codecs import FloatsCodec, codec_named, codec_of
from sparselora_dist.config.quantization import QuantizationSection
from sparselora_dist.config.run import ModelSection
from sparselora_dist.sharding.placement import RowShards
from sparselora_kernels import float_layout
from sparselora_kernels.stored import unpack
from support.compare import sqnr

CODECS = {
    "fp8": FloatsCodec(),
    "fp8, blocks": FloatsCodec(block=128, every=128),
    "nvfp4": FloatsCodec.nvfp4(),
    "nvfp4, transposed": FloatsCodec.nvfp4(transposed=True),
    "mxfp4": FloatsCodec.mxfp4(),
    "mxfp4, transposed": FloatsCodec.mxfp4(transposed=True),
}


def test_bytes_are_those_of_the_formula() -> None:
    """Bits a weight: 8 + 32 / length, 8 + 32 / 128², 4 + 8 / 16 and 32 bits of the matrix, 4 + 8 / 32."""
    channels, length = 512, 4096
    extra = {
        "fp8": 32 / length,
        "fp8, blocks": 32 / 128**2,
        "nvfp4": 8 / 16 + 32 / (channels * length),
        "mxfp4": 8 / 32,
    }
    for name, codec in CODECS.items():
        stored = sum(part.bytes(channels) for part in codec.parts(length).values())
        bits = codec.bits + extra[name.removesuffix(", transposed")]
        assert stored * 8 == bits * channels * length, name
        assert codec.name == name.split(",")[0]
    encoded = FloatsCodec().encode(torch.randn(channels, length), 0)
    assert sum(part.nbytes for part in encoded.values()) == channels * length + 4 * channels


@pytest.mark.parametrize("length", [1, 33, 4096])
def test_parts_are_as_wide_as_they_say(length: int) -> None:
    encoded = FloatsCodec().encode(torch.randn(7, length), 0)
    assert {name: (part.width, part.dtype) for name, part in FloatsCodec().parts(length).items()} == {
        name: (part.shape[1], part.dtype) for name, part in encoded.items()
    }


def test_noise_on_normal_weights() -> None:
    """31.5 dB: three bits of mantissa."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = (torch.randn(256, 4096) * 0.02).to(dtype).float()
        assert 31.4 < sqnr(matrix, FloatsCodec().roundtrip(matrix)) < 31.8


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_encode_what_one_process_does(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(45, 100).bfloat16()
    codec, whole = FloatsCodec(), FloatsCodec().encode(matrix, 0)
    monkeypatch.setattr("sparselora_dist.codecs.floats._CHUNK", 300)  # Encoded three rows at a time.
    for rank in range(size):
        start, stop = RowShards(torch.device("cpu"), rank, size).rows(45, [100, 4])
        for name, rows in codec.encode(matrix[start:stop], start).items():
            assert torch.equal(rows, whole[name][start:stop])


def test_odd_rows() -> None:
    """Zeros, a constant, outliers, the ends of fp32: all finite, and within half a step of three bits of mantissa."""
    rows = torch.randn(12, 64)
    rows[0] = 0
    rows[1] = torch.tensor([-0.0, 0.0]).repeat(32)
    rows[2], rows[3, 7] = -0.3, 1e6
    for row, size in enumerate((3.4e38, 1e30, 1e-30, 1e-35), start=4):
        rows[row] *= size / rows[row].abs().max()
    encoded = FloatsCodec().encode(rows, 0)
    scales = encoded["scales"].view(torch.float32)
    got = FloatsCodec().roundtrip(rows)
    assert got.isfinite().all() and (scales > 0).all()
    assert not got[:2].any() and not (encoded["rows"][:2] & 127).any()
    # Below 2^-6 of 448 codes are 2^-9 apart.
    assert ((got - rows).abs() <= torch.maximum(rows.abs() / 16, scales * 2.0**-10) * (1 + 1e-6)).all()
    assert torch.equal(got.abs().amax(1), (scales * 448).squeeze(1) * (rows != 0).any(1))
    tiny = torch.tensor([[1e-44, 0.0], [1e-39, -1e-41]])
    assert FloatsCodec().roundtrip(tiny).isfinite().all()
    assert FloatsCodec().roundtrip(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_values_that_are_not_finite(value: float) -> None:
    matrix = torch.randn(5, 100)
    matrix[3, 99] = value
    with pytest.raises(ValueError, match="rows of 100 values holds NaN or Inf"):
        FloatsCodec().encode(matrix, 0)


def test_what_is_only_read_is_never_made() -> None:
    for name, codec in CODECS.items():
        if name != "fp8":
            with pytest.raises(ValueError, match=rf"{codec.name} .* is read from checkpoints that hold it"):
                codec.encode(torch.randn(4, 32), 0)


def test_the_codec_of_a_run() -> None:
    model = ModelSection(name_or_path="there")
    codec = codec_of(model, QuantizationSection(format="fp8"))
    assert codec == FloatsCodec(compute=True)
    assert codec_of(model, QuantizationSection(format="fp8", fp8_compute=False)) == FloatsCodec(compute=False)
    parts = tuple(FloatsCodec().encode(torch.randn(2, 20), 0).values())
    assert unpack(codec.stored(parts, 20)).layout == float_layout(20, 8, 0, 0, 1, True) == (3, 20, 8, 0, 0, 1, 1)
    assert codec_named("nvfp4", 4) == CODECS["nvfp4"] and codec_named("mxfp4", 4) == CODECS["mxfp4"]
    assert len({codec.mark for codec in CODECS.values()}) == len(CODECS)
