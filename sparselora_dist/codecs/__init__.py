"""How frozen matrices are stored: one file per format, behind :class:`Codec`."""

from .base import Codec, Part, Share, alone
from .nf4 import NF4Codec
from .plain import PlainCodec

__all__ = ["Codec", "NF4Codec", "Part", "PlainCodec", "Share", "alone"]
