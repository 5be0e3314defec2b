"""fp8, nvfp4 and mxfp4: small floats with scales, as :mod:`sparselora_kernels.floats` lays them out.

Only fp8 with a scale per channel is made here, row by row, so that any split of the rows gives the same bytes. The others
are read from checkpoints that hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, Weight, float_layout
from sparselora_kernels.floats import E4M3, E4M3_OVER, E8M0, FP32, row_bytes, scale_bytes, to_fp8

from ..sharding.placement import Share, alone
from .base import Codec, Part

_CHUNK = 1 << 20
"""Values that are encoded at a time."""


@dataclass(frozen=True, slots=True)
class FloatsCodec(Codec):
    """``rows`` and ``scales``, and ``whole`` of nvfp4, all uint8. As it comes it is the fp8 that is made here."""

    bits: int = 8
    """8: e4m3fn. 4: e2m1."""
    scale: int = FP32
    """FP32, E4M3, E4M3_OVER or E8M0 of :mod:`sparselora_kernels.floats`."""
    block: int = 0
    """Values of a stored row that share a scale; 0: all."""
    every: int = 1
    """Channels in a line that share a row of scales; 0: all."""
    compute: bool = True
    """Of fp8: multiply in fp8 where the device can."""

    @classmethod
    def nvfp4(cls, *, transposed: bool = False) -> FloatsCodec:
        """Blocks of 16 values along the input, which is across the stored rows of a matrix stored transposed."""
        return cls(4, E4M3, *((1, 16) if transposed else (16, 1)), compute=False)

    @classmethod
    def mxfp4(cls, *, transposed: bool = False) -> FloatsCodec:
        """Blocks of 32 values along the input, likewise."""
        return cls(4, E8M0, *((1, 32) if transposed else (32, 1)), compute=False)

    def stacked(self, channels: int) -> FloatsCodec:
        """Of several matrices of ``channels`` stored rows, one below another: the experts of a mixture. They are decoded.

        Raises:
            ValueError: 4-bit codes; a scale would run over their ends.
        """
        if self.bits == 4:
            raise ValueError(f"routed experts are read in fp8, not in {self.name}")
        every = min(self.every or channels, channels)
        if channels % every:
            raise ValueError(
                f"a block of scales reaches over {every} neurons, which do not divide an expert's {channels}"
            )
        return replace(self, every=every, compute=False)

    @property
    def name(self) -> str:
        return "fp8" if self.bits == 8 else "mxfp4" if self.scale == E8M0 else "nvfp4"

    @property
    def mark(self) -> str:
        return f"{self.name}-{self.block}-{self.every}:"

    def parts(self, length: int) -> dict[str, Part]:
        parts = {
            "rows": Part(row_bytes(length, self.bits), torch.uint8),
            "scales": Part(scale_bytes(length, self.scale, self.block), torch.uint8, self.every),
        }
        return parts | ({"whole": Part(4, torch.uint8, 0)} if self.scale in (E4M3, E4M3_OVER) else {})

    def encode(self, rows: Tensor, first: int, share: Share = alone) -> dict[str, Tensor]:
        """See :meth:`Codec.encode`.

        Raises:
            ValueError: a value is not finite, or it is not fp8 with a scale per channel.
        """
        if (self.bits, self.scale, self.block, self.every) != (8, FP32, 0, 1):
            raise ValueError(
                f"{self.name} with a scale for {self.block or 'all'} values of {self.every or 'all'} channels is read from "
                'checkpoints that hold it, never made when a model is loaded: set quantization.format "fp8" or "nf4"'
            )
        n, length = rows.shape
        codes, scales = rows.new_empty((n, length), dtype=torch.uint8), rows.new_empty((n, 1), dtype=torch.float32)
        step = max(1, _CHUNK // max(1, length))
        for start in range(0, n, step):
            part = slice(start, start + step)
            codes[part], scales[part] = to_fp8(rows[part].float())
            if not bool(scales[part].isfinite().all()):
                raise ValueError(f"a matrix with rows of {length} values holds NaN or Inf, which fp8 cannot store")
        return {"rows": codes, "scales": scales.view(torch.uint8)}

    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        layout = float_layout(length, self.bits, self.scale, self.block, self.every, self.compute)
        return EncodedWeight(parts, layout)
