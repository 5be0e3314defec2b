"""How frozen matrices are stored: one file per format behind :class:`Codec`, and the linear that holds any of them."""

import torch

from ..config.quantization import Format, QuantizationSection
from ..config.run import ModelSection
from .base import Codec, Part
from .floats import FloatsCodec
from .levels import LevelsCodec
from .linear import FrozenLinear, FrozenMatrix
from .nf4 import NF4Codec
from .plain import PlainCodec


def codec_of(model: ModelSection, quantization: QuantizationSection) -> Codec:
    """How a run stores the matrices of its decoder layers."""
    if quantization.stored is None:
        return PlainCodec(getattr(torch, model.dtype))
    return codec_named(
        quantization.stored,
        quantization.width,
        double_quant=quantization.bnb_4bit_use_double_quant,
        fp8_compute=quantization.fp8_compute,
    )


def codec_named(name: Format, bits: int, *, double_quant: bool = True, fp8_compute: bool = True) -> Codec:
    """The codec of a format, with ``bits`` of code; ``double_quant`` is NF4's, ``fp8_compute`` fp8's."""
    if name == "nf4":
        return NF4Codec(double_quant=double_quant)
    if name in ("hqq", "bcq", "shiftadd", "billm"):
        return LevelsCodec(name, bits)
    if name == "fp8":
        return FloatsCodec(compute=fp8_compute)
    return FloatsCodec.nvfp4() if name == "nvfp4" else FloatsCodec.mxfp4()


__all__ = [
    "Codec",
    "FloatsCodec",
    "FrozenLinear",
    "FrozenMatrix",
    "LevelsCodec",
    "NF4Codec",
    "Part",
    "PlainCodec",
    "codec_named",
    "codec_of",
]
