"""NF4 with double quantisation, bit for bit as bitsandbytes makes it, also from shards.

A matrix whose row length is a multiple of 64 is stored as the codes, absmax and nested scales that
``bitsandbytes.functional.quantize_4bit`` gives for the whole of it, rearranged by row (see
:mod:`sparselora_kernels.nf4`). What depends on the whole matrix is the mean of absmax and the nested blocks of 256, for
which ranks exchange absmax: 1/32 of the matrix's bf16 bytes. Other row lengths are padded with zeros to full blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, Weight, nf4_layout
from sparselora_kernels.nf4 import BLOCK, NESTED_BLOCK, absmax_map, blocks, levels, nested_scales, scale_bytes

from ..sharding.placement import Share, alone
from .base import Codec, Part

# CPU encoding looks values up in a table of this many cells; only the values in the 15 cells that hold a boundary
# between two levels are searched. 6 ns a value on one core against 37 ns by bitsandbytes, and the same codes.
_CELLS = 1 << 15
_EDGE = 255
# Two values of the level 0.0.
_ZEROS = 0x77
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class NF4Codec(Codec):
    """``codes`` and ``scales``, both uint8."""

    name: ClassVar[str] = "nf4"
    double_quant: bool = True

    @property
    def mark(self) -> str:
        return "nf4-double:" if self.double_quant else "nf4:"

    def parts(self, length: int) -> dict[str, Part]:
        return {
            "codes": Part(blocks(length) * BLOCK // 2, torch.uint8),
            "scales": Part(scale_bytes(length, self.double_quant), torch.uint8),
        }

    def encode(self, rows: Tensor, first: int, share: Share = alone) -> dict[str, Tensor]:
        """See :meth:`Codec.encode`.

        Raises:
            ValueError: a value is not finite.
        """
        length = rows.shape[1]
        if padding := -length % BLOCK:
            rows = torch.nn.functional.pad(rows, (0, padding))
        codes, absmax = quantize_rows(rows.contiguous(), length)
        if not self.double_quant:
            return {"codes": codes, "scales": _bytes(absmax)}
        return {"codes": codes, "scales": pack_scales(*quantize_absmax(absmax, first, share(absmax)), first)}

    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        return EncodedWeight(parts, nf4_layout(length, self.double_quant))


def quantize_rows(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Codes (n, padded / 2) uint8 and absmax (n, nb) fp32 of rows of whole blocks."""
    n, padded = rows.shape
    if not n:
        return rows.new_empty((0, padded // 2), dtype=torch.uint8), rows.new_empty((0, padded // BLOCK)).float()
    if rows.device.type == "cpu":
        codes, absmax = _quantize_cpu(rows)
        finite = bool(absmax.isfinite().all())
    else:
        import bitsandbytes  # noqa: F401  (registers the operators)

        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
        # Divided by their absmax of zero, the values of an empty block become NaN there, and the lowest level.
        codes.view(-1, BLOCK // 2).masked_fill_((absmax.view(-1, 1) == 0), _ZEROS)
        finite = all(bool(end.isfinite()) for end in rows.aminmax())  # The kernel's absmax passes over NaN.
    if not finite:
        raise ValueError(f"a matrix with rows of {length} values holds NaN or Inf, which 4-bit codes cannot store")
    return codes.view(n, padded // 2), absmax.view(n, padded // BLOCK)


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """Boundaries between levels, (15,) fp32; and the level of each cell, (_CELLS + 1,) uint8, 255 where it holds one."""
    values = levels(torch.device("cpu"))
    bounds = (values[:-1] + values[1:]) / 2
    at_bound = _cell(bounds * (_CELLS / 2))
    cells = torch.searchsorted(at_bound, torch.arange(_CELLS + 1, dtype=torch.int32)).to(torch.uint8)
    cells[at_bound.long()] = _EDGE
    return bounds, cells


def _cell(scaled: Tensor) -> Tensor:
    """Cell of each value in [-_CELLS/2, _CELLS/2]. Monotonic, rounding included: a value in another cell than a boundary
    is on that cell's side of it."""
    return (scaled + _CELLS / 2).to(torch.int32)


def _quantize_cpu(rows: Tensor) -> tuple[Tensor, Tensor]:
    bounds, cells = _tables()
    flat = rows.view(-1, BLOCK)
    absmax = torch.empty(flat.shape[0])
    codes = torch.empty(flat.shape[0] * BLOCK // 2, dtype=torch.uint8)
    step = _CHUNK // BLOCK
    for start in range(0, flat.shape[0], step):
        values = flat[start : start + step]
        largest = _largest(values)
        absmax[start : start + step] = largest
        if not torch.isfinite(largest).all():
            break  # Reported by the caller.
        # bitsandbytes' own rounding of value / absmax, times a power of two.
        scaled = (values * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).view(-1).mul_(_CELLS / 2)
        level = cells.index_select(0, _cell(scaled))
        # numpy, because there are few of them and torch takes twice as long to find them as for all of the above.
        edge = torch.from_numpy(np.flatnonzero(level.numpy() == _EDGE))
        if edge.numel():
            level[edge] = torch.bucketize(scaled[edge], bounds * (_CELLS / 2), out_int32=True).to(torch.uint8)
        pairs = level.view(torch.int16)  # The second value of a pair is the high byte.
        codes[start * BLOCK // 2 :][: pairs.numel()] = (pairs << 4).bitwise_or_(pairs >> 8)
    return codes, absmax


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude of each row, fp32; NaN where there is one. Without their sign, floats are ordered as integers."""
    kinds = {2: torch.int16, 4: torch.int32}
    bits = values.view(kinds[values.itemsize])
    return (bits & torch.iinfo(bits.dtype).max).amax(1).view(values.dtype).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantize_absmax(absmax: Tensor, first: int, everyone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of the absmax (n, nb) of rows from ``first`` on, ``everyone`` (C, nb) being all of them.

    Returns:
        Absmax codes (n, nb) uint8, the nested scales from the block of row ``first`` on (b,) fp32, the offset () fp32.
    """
    from bitsandbytes.functional import quantize_blockwise

    # On a CPU a mean over threads is another sum on another machine: in one thread all world sizes agree. GPUs of one
    # kind sum in one order; another kind, or a CPU, may differ in the last bit.
    with _one_thread():
        offset = everyone.reshape(-1).mean()
    begin, end = first * absmax.shape[1], (first + absmax.shape[0]) * absmax.shape[1]
    begin_block = begin // NESTED_BLOCK * NESTED_BLOCK
    end_block = -(-end // NESTED_BLOCK) * NESTED_BLOCK
    values = everyone.reshape(-1)[begin_block:end_block] - offset
    if not values.numel():
        return absmax.to(torch.uint8), values, offset
    codes, state = quantize_blockwise(values, code=absmax_map(values.device), blocksize=NESTED_BLOCK)
    return codes[begin - begin_block : end - begin_block].view(absmax.shape), state.absmax, offset


def pack_scales(codes: Tensor, nested: Tensor, offset: Tensor, first: int) -> Tensor:
    """Rows of ``scales`` from what :func:`quantize_absmax` returns."""
    n, count = codes.shape
    starts = torch.arange(first, first + n, device=codes.device) * count // NESTED_BLOCK - first * count // NESTED_BLOCK
    slots = starts[:, None] + torch.arange(nested_scales(count), device=codes.device)
    # Past the last block nothing is read.
    own = nested[slots.clamp_(max=max(nested.numel() - 1, 0))] if n else nested.new_empty(0, nested_scales(count))
    return torch.cat([codes, _bytes(own), _bytes(offset.view(1, 1).expand(n, 1))], 1)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
