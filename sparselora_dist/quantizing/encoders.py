"""Which encoder a format has."""

from __future__ import annotations

from torch import Tensor

from ..codecs import Codec, FloatsCodec, LevelsCodec
from .groups import BillmEncoder, Encoder, Float8Encoder


def encoder_of(codec: Codec, matrix: Tensor) -> Encoder:
    """For a matrix (channels, length) as it is stored."""
    size = matrix.shape[0], matrix.shape[1], matrix.device
    if isinstance(codec, FloatsCodec):
        return Float8Encoder(*size)
    assert isinstance(codec, LevelsCodec), f"{codec.name} is not made here"
    if codec.format == "billm":
        return BillmEncoder(*size)
    raise NotImplementedError(codec.name)
