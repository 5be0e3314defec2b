"""bf16 or fp32 as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparselora_kernels import Weight

from ..sharding.placement import Share, alone
from .base import Codec, Part


@dataclass(frozen=True, slots=True)
class PlainCodec(Codec):
    """One tensor, ``rows`` (C, length)."""

    name: ClassVar[str] = "plain"
    dtype: torch.dtype

    @property
    def mark(self) -> str:
        return ""

    def parts(self, length: int) -> dict[str, Part]:
        return {"rows": Part(length, self.dtype)}

    def encode(self, rows: Tensor, first: int, share: Share = alone) -> dict[str, Tensor]:
        return {"rows": rows.to(self.dtype)}

    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        return parts[0]
