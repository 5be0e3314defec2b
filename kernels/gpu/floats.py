"""Decoding rows of an fp8 or fp4 matrix in one launch; layout and formula in :mod:`sparselora_kernels.floats`.

A program decodes 2048 values of one row, 16 a thread. Codes are looked up in a table, since not every target has a type for
them, and fp32 scales are put together from bytes, which may begin anywhere. Where 16 divides the block, or a row has one
scale, the 16 values of a thread share theirs; otherwise each value looks for its own. All products are fp32 and rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import float_at
from .tiles import rounded
from .variants import TYPE_NAMES, Variant

GROUPS, NUM_WARPS = 128, 4
DTYPES = (torch.bfloat16, torch.float32)
_ALL = (1 << 31) - 1
"""More values than a row has, more channels than a matrix."""
_FREE = ("length", "first", "row_stride", "scale_stride", "block", "every")


@triton.jit
def _scale_at(at, whole, scale_table, mask, SCALE: tl.constexpr):
    """The fp32 scale from its four bytes, or from its one."""
    if SCALE == 0:
        return float_at(at, mask)
    scale = tl.load(scale_table + tl.load(at, mask=mask, other=0).to(tl.int32))
    if SCALE == 1:
        scale *= float_at(whole, True)
    elif SCALE == 3:
        scale = tl.div_rn(scale, float_at(whole, True) + tl.zeros_like(scale))
    return scale


@triton.jit(do_not_specialize=_FREE)
def float_rows_kernel(
    rows,  # (C, length) uint8, or half of it
    scales,  # (ceil(C / every), ceil(length / block) scales) uint8
    whole,  # (1, 4) uint8
    channels,  # (k,) int64
    table,  # (256 or 16,) fp32
    scale_table,  # (256,) fp32
    out,  # (k, length)
    length,
    first,  # Number of the first row in the matrix, where rows share scales.
    row_stride,
    scale_stride,
    block,
    every,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    ALIKE: tl.constexpr,  # The 16 values of a group share a scale.
    GROUPS: tl.constexpr,
):
    per_row = tl.cdiv(length, GROUPS * 16)
    place = (tl.program_id(0) // per_row).to(tl.int64)
    group = tl.program_id(0) % per_row * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = column < length
    row = tl.load(channels + place)
    if BITS == 8:
        code = tl.load(rows + row * row_stride + column, mask=inside, other=0).to(tl.int32)
        values = tl.load(table + code)
    else:
        byte = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        pair = tl.load(rows + row * row_stride + byte, mask=byte * 2 < length, other=0).to(tl.int32)
        values = tl.interleave(tl.load(table + (pair & 15)), tl.load(table + (pair >> 4)))
    WIDTH: tl.constexpr = 4 if SCALE == 0 else 1
    scale_at = scales + (row + first) // every * scale_stride
    if ALIKE:
        scale = _scale_at(scale_at + group * 16 // block * WIDTH, whole, scale_table, group * 16 < length, SCALE)
        values *= scale[:, None]
    else:
        values *= _scale_at(scale_at + column // block * WIDTH, whole, scale_table, inside, SCALE)
    tl.store(out + place * length + column, rounded(values, out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Each combination of codes and scales that a format has, in both dtypes, with and without groups alike."""
    pointers = {
        "rows": "*u8", "scales": "*u8", "whole": "*u8", "channels": "*i64", "table": "*fp32", "scale_table": "*fp32",
    }  # fmt: skip
    for dtype in DTYPES:
        for bits, scale in ((8, 0), (8, 2), (4, 1), (4, 2), (4, 3)):
            for alike in (True, False):
                name = TYPE_NAMES[dtype]
                yield Variant(
                    kernel=float_rows_kernel,
                    label=f"floats {name} {bits} bits, scale {scale} {'alike' if alike else 'any'}",
                    signature=pointers | {"out": f"*{name}"} | dict.fromkeys(_FREE, "i32"),
                    constants={"BITS": bits, "SCALE": scale, "ALIKE": alike, "GROUPS": GROUPS},
                    num_warps=NUM_WARPS,
                    fp_fusion=False,
                    aligned=("channels", "table", "scale_table", "out"),
                )


def float_rows(
    rows: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    channels: Tensor | None,
    table: Tensor,
    scale_table: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    bits: int,
    scale: int,
    block: int,
    every: int,
    first: int,
) -> Tensor:
    """See :func:`sparselora_kernels.float_rows`.

    Args:
        table: (2 ** bits,) fp32, the value of each code.
        scale_table: (256,) fp32, the value of each byte of a scale; ``None`` where scales are fp32.
    """
    count = rows.shape[0] if channels is None else channels.shape[0]
    out = rows.new_empty((count, length), dtype=dtype)
    if not out.numel():
        return out
    rows, scales = (part if part.stride(1) == 1 else part.contiguous() for part in (rows, scales))
    if channels is None:
        channels = torch.arange(count, device=rows.device)
    float_rows_kernel[(count * triton.cdiv(length, GROUPS * 16),)](
        rows, scales, scales if whole is None else whole, channels, table, table if scale_table is None else scale_table,
        out, length, 0 if every == 1 else first, rows.stride(0), scales.stride(0), block or _ALL, every or _ALL,
        BITS=bits, SCALE=scale, ALIKE=block % 16 == 0, GROUPS=GROUPS, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
