"""Decoding rows of an NF4 matrix in one launch; layout and formula in :mod:`sparselora_kernels.nf4`.

A program decodes a run of absmax blocks of one row: it reads 32 bytes of codes for each, makes the absmax from the
row's own scale bytes (which may begin anywhere, so fp32 is put together from bytes), and writes 64 values. The product
is taken in fp32 and rounded once, and absmax is rounded after its product and after its sum, as torch does: no fusion.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import rounded
from .variants import TYPE_NAMES, Variant

# Absmax blocks per program: 2048 values, 16 a thread. A row of 4096 values takes two programs.
BLOCKS, NUM_WARPS = 32, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def float_at(at, mask):
    """fp32 from four bytes, the lowest first, at any address."""
    bits = tl.load(at, mask=mask, other=0).to(tl.uint32)
    bits |= tl.load(at + 1, mask=mask, other=0).to(tl.uint32) << 8
    bits |= tl.load(at + 2, mask=mask, other=0).to(tl.uint32) << 16
    bits |= tl.load(at + 3, mask=mask, other=0).to(tl.uint32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count", "scale_width", "length", "first", "code_blocks", "scale_stride"])
def nf4_rows_kernel(
    codes,  # (C, 32 * count) uint8, rows 32 * code_blocks bytes apart
    scales,  # (C, scale_width) uint8
    channels,  # (k,) int64
    levels,  # (16,) fp32
    absmax_map,  # (256,) fp32, not read without double quantisation
    out,  # (k, length)
    count,  # Absmax blocks of a row.
    scale_width,
    length,
    first,  # Number of the first row in its matrix.
    code_blocks,
    scale_stride,
    DOUBLE_QUANT: tl.constexpr,
    WHOLE: tl.constexpr,  # 64 divides the length, so that every block begins at a multiple of 64 values.
    BLOCKS: tl.constexpr,
):
    per_row = tl.cdiv(count, BLOCKS)
    place = (tl.program_id(0) // per_row).to(tl.int64)
    block = tl.program_id(0) % per_row * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < count
    row = tl.load(channels + place)
    scale_at = scales + row * scale_stride
    if DOUBLE_QUANT:
        begin = (first + row) * count  # Of this row's absmax values in those of the matrix.
        slot = ((begin + block) // 256 - begin // 256).to(tl.int32)
        code = tl.load(scale_at + block, mask=inside, other=0).to(tl.int32)
        nested = float_at(scale_at + count + 4 * slot, inside)
        offset = float_at(scale_at + scale_width - 4, True)
        absmax = tl.load(absmax_map + code) * nested + offset
    else:
        absmax = float_at(scale_at + 4 * block, inside)
    code_at = codes + (row * code_blocks + block)[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(code_at, mask=inside[:, None], other=0).to(tl.int32)  # (BLOCKS, 32)
    high = tl.load(levels + (pair >> 4)) * absmax[:, None]
    low = tl.load(levels + (pair & 15)) * absmax[:, None]
    values = rounded(tl.interleave(high, low), out.dtype.element_ty)  # (BLOCKS, 64)
    if WHOLE:
        out_at = out + (place * count + block)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out_at, values, mask=inside[:, None])
    else:
        column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out + place * length + column, values, mask=column < length)


def variants() -> Iterator[Variant]:
    """Every dtype, with and without double quantisation, rows of whole blocks and others."""
    signature = {
        "codes": "*u8", "scales": "*u8", "channels": "*i64", "levels": "*fp32", "absmax_map": "*fp32",
        **dict.fromkeys(("count", "scale_width", "length", "first", "code_blocks", "scale_stride"), "i32"),
    }  # fmt: skip
    for dtype in DTYPES:
        for double_quant in (True, False):
            for whole in (True, False):
                name = TYPE_NAMES[dtype]
                yield Variant(
                    kernel=nf4_rows_kernel,
                    label=f"nf4 {name} {'double' if double_quant else 'single'} {'whole' if whole else 'any'}",
                    signature=signature | {"out": f"*{name}"},
                    constants={"DOUBLE_QUANT": double_quant, "WHOLE": whole, "BLOCKS": BLOCKS},
                    num_warps=NUM_WARPS,
                    fp_fusion=False,
                    aligned=("codes", "channels", "levels", "absmax_map", "out"),
                )


def nf4_rows(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    levels: Tensor,
    absmax_map: Tensor,
    dtype: torch.dtype,
    *,
    length: int,
    double_quant: bool,
    first: int,
) -> Tensor:
    """See :func:`sparselora_kernels.nf4_rows`.

    Args:
        levels: (16,) fp32, the value of each code.
        absmax_map: (256,) fp32, the value of each absmax code.
    """
    rows = codes.shape[0] if channels is None else channels.shape[0]
    out = codes.new_empty((rows, length), dtype=dtype)
    if not out.numel():
        return out
    if codes.stride(1) != 1 or codes.stride(0) % 32:
        codes = codes.contiguous()
    if scales.stride(1) != 1:
        scales = scales.contiguous()
    if channels is None:
        channels = torch.arange(rows, device=codes.device)
    count = codes.shape[1] // 32
    nf4_rows_kernel[(rows * triton.cdiv(count, BLOCKS),)](
        codes, scales, channels, levels, absmax_map, out,
        count, scales.shape[1], length, first, codes.stride(0) // 32, scales.stride(0),
        DOUBLE_QUANT=double_quant, WHOLE=length % 64 == 0, BLOCKS=BLOCKS, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
