"""Which encoder a format has."""

from __future__ import annotations

from torch import Tensor

from ..codecs import Codec, FloatsCodec, LevelsCodec, bcq, hqq
from .groups import BillmEncoder, Encoder, Float8Encoder, LevelsEncoder


def encoder_of(codec: Codec, matrix: Tensor) -> Encoder:
    """For a matrix (channels, length) as it is stored."""
    size = matrix.shape[0], matrix.shape[1], matrix.device
    if isinstance(codec, FloatsCodec):
        return Float8Encoder(*size)
    assert isinstance(codec, LevelsCodec), f"{codec.name} is not made here"
    if codec.format == "billm":
        return BillmEncoder(*size)
    if codec.format == "hqq":
        return LevelsEncoder(*size, codec, lambda values, costs: hqq.quantize(values, codec.bits))
    powers = codec.format == "shiftadd"
    return LevelsEncoder(
        *size, codec, lambda values, costs: bcq.quantize(values, codec.bits, powers=powers, weights=costs)
    )
