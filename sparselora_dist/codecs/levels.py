"""Few bits of code a value and a few numbers per group of 128 values of a row: hqq, bcq, shiftadd and billm.

What the codes mean and how they lie in memory is :mod:`sparselora_kernels.levels`; how they are found is ``hqq.py`` and
``bcq.py``. Every row is encoded alone, so that ranks make the same bytes however they split a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, Weight, level_layout
from sparselora_kernels.levels import BILLM, HQQ, SIGNS, widths

from ..sharding.placement import Share, alone
from .base import Codec, Part

LevelFormat = Literal["hqq", "bcq", "shiftadd", "billm"]
RULES: dict[str, int] = {"hqq": HQQ, "bcq": SIGNS, "shiftadd": SIGNS, "billm": BILLM}
"""By format, what the kernels compute."""


@dataclass(frozen=True, slots=True)
class LevelsCodec(Codec):
    """``codes`` and ``params``, and for billm ``columns``, which all rows share; uint8.

    Raises:
        ValueError: the format has no codes of so many bits.
    """

    format: LevelFormat
    bits: int

    def __post_init__(self) -> None:
        level_layout(1, RULES[self.format], self.bits)

    @property
    def name(self) -> str:
        return f"{self.format} ({self.bits} bit)"

    @property
    def mark(self) -> str:
        return f"{self.format}{self.bits}:"

    def parts(self, length: int) -> dict[str, Part]:
        found = zip(("codes", "params", "columns"), widths(length, RULES[self.format], self.bits))
        return {name: Part(width, torch.uint8, every=0 if name == "columns" else 1) for name, width in found}

    def encode(self, rows: Tensor, first: int, share: Share = alone) -> dict[str, Tensor]:
        """See :meth:`Codec.encode`.

        Raises:
            ValueError: a value is not finite, or too large for fp16 numbers; or the format is billm.
        """
        raise ValueError(
            "billm needs data, so it is not made when a model is loaded: make a checkpoint of it with "
            "'sparselora-dist quantize', and load that"
        )

    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        return EncodedWeight(parts, level_layout(length, RULES[self.format], self.bits))
