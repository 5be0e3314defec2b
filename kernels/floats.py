"""Frozen matrices in fp8 and fp4, decoded row by row.

    value = table[code] · scale      the product in fp32, rounded once to the dtype that is asked for

8 bits are e4m3fn (fp8), 4 bits are e2m1 (nvfp4, mxfp4). Who shares a scale differs: ``block`` values of a row (0: all
of it) of ``every`` channels in a line (0: all of them). So a scale per channel is block 0, every 1; the same of a matrix
that is stored transposed is block 1, every 0; a scale for all is block 0, every 0; blocks of 128 by 128 are block 128,
every 128. Scales come in four kinds:

    FP32        fp32                                        fp8
    E4M3        e4m3fn, times one fp32 of the whole matrix  nvfp4: table[code] · (scale · whole), rounded to fp32 twice
    E4M3_OVER   e4m3fn, divided by it                       nvfp4 in other files: table[code] · (scale / whole), likewise
    E8M0        a power of two, 2^(byte - 127)              mxfp4

Parts of a matrix (C, length), nb = ceil(length / block), or 1 for block 0:

    rows    (C, length) uint8               8 bits
            (C, ceil(length / 2)) uint8     4 bits: two values a byte, the first in the low half
    scales  (ceil(C / every), nb · 4 or 1) uint8, one row for every 0
    whole   (1, 4) uint8, E4M3 and E4M3_OVER only: the fp32 that all channels share

Scales are bytes on purpose: an engine that computes in bf16 would round fp32 parameters. There is no fp8 type in the kernel
either, since GPUs before sm_89 have none: codes are looked up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .operator import register

FP32, E4M3, E8M0, E4M3_OVER = 0, 1, 2, 3
"""Kinds of scales."""
LARGEST = 448.0
"""The largest value of e4m3fn."""
_SMALLEST = torch.finfo(torch.float32).tiny
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CHUNK = 1 << 17
"""Values that are decoded at a time on a CPU: in its cache."""


def blocks(length: int, block: int) -> int:
    """Scales of a row of ``length`` values."""
    return -(-length // block) if block else 1


def row_bytes(length: int, bits: int) -> int:
    """Width of a row of ``rows``."""
    return length if bits == 8 else -(-length // 2)


def scale_bytes(length: int, scale: int, block: int) -> int:
    """Width of a row of ``scales``."""
    return blocks(length, block) * (4 if scale == FP32 else 1)


@cache
def code_values(bits: int, device: torch.device) -> Tensor:
    """The value of each code, (2 ** bits,) fp32; fp8 has two that are NaN."""
    if bits == 4:
        return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@cache
def scale_values(scale: int, device: torch.device) -> Tensor:
    """The value of each byte of a scale that has one, (256,) fp32; the last of E8M0 is NaN."""
    if scale != E8M0:
        return code_values(8, device)
    powers = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    powers[255] = torch.nan
    return powers.float().to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of each byte of 4-bit codes, as one number that is looked up once: (256,) complex64."""
    values, byte = code_values(4, device), torch.arange(256, device=device)
    return torch.complex(values[byte & 15], values[byte >> 4])


def floats_of(data: Tensor) -> Tensor:
    """The fp32 numbers (n, width / 4) of bytes (n, width)."""
    # A copy, because a gathered parameter may begin at any byte of its buffer.
    return data.clone(memory_format=torch.contiguous_format).view(torch.float32)


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, length) uint8 and scales (n, 1) fp32 of fp32 rows: the largest magnitude of a row becomes 448.

    A scale is never less than the smallest normal fp32, so that a row of zeros has one too, and codes of zero. Rows that are
    not finite become NaN.
    """
    largest = values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(values.shape[0], 1)
    scales = (largest / LARGEST).clamp_(min=_SMALLEST)
    # By rounding, a quotient can be a bit more than 448, and what fp8 cannot hold would become NaN.
    codes = (values / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def row_scales(
    scales: Tensor, whole: Tensor | None, channels: Tensor | None, count: int, scale: int, every: int, first: int = 0
) -> Tensor:
    """The scales of chosen rows, (k, nb) fp32, or (1, nb) where all rows share them.

    Args:
        channels: (k,) int64, or ``None`` for all ``count`` rows.
        first: number of the first row that ``channels`` counts from in the whole matrix.
    """
    if every == 1:
        scales = scales if channels is None else scales.index_select(0, channels)
    elif every:
        numbers = torch.arange(count, device=scales.device) if channels is None else channels
        scales = scales.index_select(0, (numbers + first) // every)
    if scale == FP32:
        return floats_of(scales)
    values = scale_values(scale, scales.device).index_select(0, scales.reshape(-1).int()).view(scales.shape)
    if whole is None:
        return values
    return values.div_(floats_of(whole)) if scale == E4M3_OVER else values.mul_(floats_of(whole))


def float_rows(
    rows: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    bits: int,
    scale: int,
    block: int,
    every: int,
    first: int = 0,
) -> Tensor:
    """Decode ``channels`` of an fp8 or fp4 matrix. Carries no gradient.

    Args:
        rows, scales, whole: uint8, laid out as above; gathered. ``rows`` may begin at row ``first`` of the matrix, and so
            do ``scales`` then where ``every`` is 1; otherwise they are whole.
        channels: (k,) int64 rows of ``rows``, or ``None`` for all.
        dtype: of the result.

    Returns:
        (k, length).
    """
    return _run(rows, scales, whole, channels, dtype, [length, bits, scale, block, every], first)


def _float_rows(
    rows: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    layout: list[int],
    first: int,
) -> Tensor:
    length, bits, scale, block, every = layout
    if use_triton(rows):
        from .gpu import floats

        if dtype not in floats.DTYPES:
            return _float_rows(rows, scales, whole, channels, torch.float32, layout, first).to(dtype)
        tables = code_values(bits, rows.device), None if scale == FP32 else scale_values(scale, rows.device)
        with torch.cuda.device_of(rows):
            return floats.float_rows(
                rows, scales, whole, channels, *tables, dtype,
                length=length, bits=bits, scale=scale, block=block, every=every, first=first,
            )  # fmt: skip
    count = rows.shape[0] if channels is None else channels.shape[0]
    out = rows.new_empty((count, length), dtype=dtype)
    step = max(1, _CHUNK // max(1, length))
    for start in range(0, count, step):
        part = slice(start, start + step)
        number = None if channels is None else channels[part]
        codes = rows[part] if number is None else rows.index_select(0, number)
        found = row_scales(
            scales[part] if number is None and every == 1 else scales,
            whole, number, codes.shape[0], scale, every, first + (start if number is None else 0),
        )  # fmt: skip
        out[part] = _scaled(_values(codes, bits, length), found, block)
    return out


def _values(codes: Tensor, bits: int, length: int) -> Tensor:
    """The values (k, length) fp32 of rows of codes; with a stride where a row ends in half a byte."""
    flat = codes.reshape(-1).int()
    if bits == 8:
        return code_values(8, codes.device).index_select(0, flat).view(codes.shape)
    pairs = torch.view_as_real(_pairs(codes.device).index_select(0, flat))
    return pairs.view(codes.shape[0], 2 * codes.shape[1])[:, :length]


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """``values`` (k, length), times the scale (k or 1, nb) of their block, in place."""
    if block <= 1:
        return values.mul_(scales)
    full = values.shape[1] // block
    values[:, : full * block].unflatten(1, (full, block)).mul_(scales[:, :full, None])
    if values.shape[1] > full * block:
        values[:, full * block :].mul_(scales[:, full:])
    return values


def _float_rows_fake(
    rows: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    layout: list[int],
    *_: Any,
) -> Tensor:
    return rows.new_empty((rows.shape[0] if channels is None else channels.shape[0], layout[0]), dtype=dtype)


_run = register("float_rows", _float_rows, _float_rows_fake)
