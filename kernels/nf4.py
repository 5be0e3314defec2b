"""NF4, the 4-bit normal float of QLoRA (arXiv 2305.14314), decoded row by row.

    value = level[code] · absmax          one absmax per 64 values of a row (the last block padded with zeros)
    absmax = map[q] · nested + offset     double quantisation: 8-bit absmax, one nested scale per 256 of them

The numbers are bitsandbytes' own, its block order included: the nested blocks run on over the rows of a matrix, so that
256 absmax values may belong to several rows or to a part of one. Each row therefore carries the nested scales of the
blocks that it touches, and the offset, and can be decoded alone.

Layout of a row of ``length`` values, nb = ceil(length / 64), m = :func:`nested_scales`:

    codes   (C, 32·nb) uint8    two values a byte, the first in the high half
    scales  (C, nb + 4·m + 4) uint8    nb absmax codes, m fp32 nested scales, the fp32 offset
            (C, 4·nb) uint8            without double quantisation: nb fp32 absmax

Scales are bytes on purpose: an engine that computes in bf16 would round fp32 parameters.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .operator import register

BLOCK = 64
"""Values per absmax."""
NESTED_BLOCK = 256
"""Absmax values per nested scale."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def blocks(length: int) -> int:
    """Absmax values of a row of ``length`` values."""
    return -(-length // BLOCK)


def nested_scales(count: int) -> int:
    """The most nested blocks that a row of ``count`` absmax values touches, wherever it lies in the matrix."""
    step = math.gcd(count, NESTED_BLOCK)
    return (NESTED_BLOCK - step + count - 1) // NESTED_BLOCK + 1


def scale_bytes(length: int, double_quant: bool) -> int:
    """Width of a row of ``scales``."""
    count = blocks(length)
    return count + 4 * nested_scales(count) + 4 if double_quant else 4 * count


def nested_slots(rows: Tensor, count: int) -> Tensor:
    """Which of its own nested scales each absmax of the given rows (int64) uses: (k, count) int64."""
    first = rows[:, None] * count
    return (first + torch.arange(count, device=rows.device)) // NESTED_BLOCK - first // NESTED_BLOCK


@cache
def absmax_map(device: torch.device) -> Tensor:
    """bitsandbytes' dynamic 8-bit map, (256,) fp32."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


@cache
def levels(device: torch.device) -> Tensor:
    """The value of each code, (16,) fp32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu").to(device)


def _floats(data: Tensor) -> Tensor:
    # A copy, because a gathered parameter may begin at any byte of its buffer.
    return data.clone(memory_format=torch.contiguous_format).view(torch.float32)


def row_absmax(scales: Tensor, channels: Tensor | None, length: int, double_quant: bool, first: int = 0) -> Tensor:
    """The absmax of every block of the chosen rows, (k, nb) fp32; ``first`` is the number of ``scales``' first row."""
    count = blocks(length)
    rows = scales if channels is None else scales.index_select(0, channels)
    if not double_quant:
        return _floats(rows)
    nested = _floats(rows[:, count:-4])
    if NESTED_BLOCK % count:  # Otherwise every row lies in one nested block.
        numbers = torch.arange(scales.shape[0], device=scales.device) if channels is None else channels
        nested = nested.gather(1, nested_slots(numbers + first, count))
    absmax = absmax_map(scales.device).index_select(0, rows[:, :count].reshape(-1).int()).view(-1, count)
    return absmax.mul_(nested).add_(_floats(rows[:, -4:]))


def nf4_rows(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    double_quant: bool,
    first: int = 0,
) -> Tensor:
    """Decode ``channels`` of an NF4 matrix, by bitsandbytes' own kernel on the CPU. Carries no gradient.

    Args:
        codes, scales: uint8, laid out as above; whole (gathered), all C channels, or from row ``first`` on.
        channels: (k,) int64 rows of these, or ``None`` for all.
        dtype: of the result; the product is taken in fp32 and rounded once.
        length: values per row.
        double_quant: whether absmax is quantised.

    Returns:
        (k, length).
    """
    return _run(codes, scales, channels, dtype, length, double_quant, first)


def _nf4_rows(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    dtype: torch.dtype,
    length: int,
    double_quant: bool,
    first: int,
) -> Tensor:
    if use_triton(codes) and dtype in _KERNEL_DTYPES:
        from .gpu import nf4

        tables = levels(codes.device), absmax_map(codes.device)
        with torch.cuda.device_of(codes):
            return nf4.nf4_rows(
                codes, scales, channels, *tables, dtype, length=length, double_quant=double_quant, first=first
            )
    if dtype not in _KERNEL_DTYPES:  # bitsandbytes would write nothing.
        return _nf4_rows(codes, scales, channels, torch.float32, length, double_quant, first).to(dtype)
    import bitsandbytes  # noqa: F401  (registers the operators)

    absmax = row_absmax(scales, channels, length, double_quant, first)
    rows = codes if channels is None else codes.index_select(0, channels)
    shape = (rows.shape[0], absmax.shape[1] * BLOCK)
    if not rows.shape[0]:
        return codes.new_empty((0, length), dtype=dtype)
    values = torch.ops.bitsandbytes.dequantize_4bit(
        rows.reshape(-1, 1), absmax.reshape(-1), BLOCK, "nf4", list(shape), dtype
    ).view(shape)
    return values if shape[1] == length else values[:, :length].contiguous()


def _nf4_rows_fake(
    codes: Tensor, scales: Tensor, channels: Tensor | None, dtype: torch.dtype, length: int, *_: Any
) -> Tensor:
    return codes.new_empty((codes.shape[0] if channels is None else channels.shape[0], length), dtype=dtype)


_run = register("nf4_rows", _nf4_rows, _nf4_rows_fake)
