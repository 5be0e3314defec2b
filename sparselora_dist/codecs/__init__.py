"""How frozen matrices are stored: one file per format behind :class:`Codec`, and the linear that holds any of them."""

import torch

from ..config.quantization import QuantizationSection
from ..config.run import ModelSection
from .base import Codec, Part
from .linear import FrozenLinear, FrozenMatrix
from .nf4 import NF4Codec
from .plain import PlainCodec


def codec_of(model: ModelSection, quantization: QuantizationSection) -> Codec:
    """How a run stores the matrices of its decoder layers."""
    if quantization.load_in_4bit:
        return NF4Codec(double_quant=quantization.bnb_4bit_use_double_quant)
    return PlainCodec(getattr(torch, model.dtype))


__all__ = ["Codec", "FrozenLinear", "FrozenMatrix", "NF4Codec", "Part", "PlainCodec", "codec_of"]
