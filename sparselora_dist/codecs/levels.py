"""Few bits of code a value and a few numbers per group of 128 values of a row: hqq, bcq, shiftadd and billm.

What the codes mean and how they lie in memory is :mod:`sparselora_kernels.levels`; how they are found is ``hqq.py`` and
``bcq.py``. Every row is encoded alone, so that ranks make the same bytes however they split a matrix.

fp16 numbers have no more than 2^-24 to tell sizes apart: a scale is wrong by up to half of that, and what is smaller becomes
zero. A weight of 1e-6 is stored within some 1e-7 of it, one below 3e-8 as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, Weight, level_layout
from sparselora_kernels.levels import BILLM, HQQ, SIGNS, pack_codes, pack_params, widths

from ..sharding.placement import Share, alone
from .base import Codec, Part
from .bcq import quantize as quantize_bcq
from .grouped import row_chunks
from .hqq import quantize as quantize_hqq

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
        if self.format == "billm":
            raise ValueError(
                "billm needs data, so it is not made when a model is loaded: make a checkpoint of it with "
                "'sparselora-dist quantize', and load that"
            )
        n, length = rows.shape
        if n and not all(bool(end.isfinite()) for end in rows.aminmax()):
            raise ValueError(f"a matrix with rows of {length} values holds NaN or Inf, which {self.name} cannot store")
        made = {
            name: torch.empty(n, part.width, dtype=part.dtype, device=rows.device)
            for name, part in self.parts(length).items()
        }
        for chunk in row_chunks(rows):
            codes, params = self._quantize(rows[chunk])
            if not bool(params.isfinite().all()):
                raise ValueError(
                    f"a matrix with rows of {length} values holds some so large that {self.name} cannot store them: its "
                    f"numbers are fp16, up to {torch.finfo(torch.float16).max:.0f}"
                )
            made["codes"][chunk], made["params"][chunk] = pack_codes(codes, self.bits), pack_params(params)
        return made

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.format == "hqq":
            return quantize_hqq(rows, self.bits)
        return quantize_bcq(rows, self.bits, powers=self.format == "shiftadd")

    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        return EncodedWeight(parts, level_layout(length, RULES[self.format], self.bits))
