"""A pruned matrix' zeros in Triton: the weight of a masked adapter in one pass, and its gradient without what is pruned.

A program has a tile of the matrix as it is stored. The low-rank update is so short a sum that reading and writing the
matrix is what takes time: once each, against five passes of a product and a mask one after another. Whether a value is
zero is read from what is stored, of NF4 from its code (:mod:`sparselora_kernels.nonzero`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stored import EncodedWeight
from .indexing import index_at, low_rank
from .matrix import unit_stride
from .tiles import rounded
from .tiling import RANK_STEP
from .variants import TYPE_NAMES, Variant

BLOCK_M, BLOCK_N, NUM_WARPS = 32, 128, 4
DTYPES = (torch.bfloat16, torch.float32)
_FREE = ("n", "length", "given")


@triton.jit
def _nonzero_at(stored, row, j, inside, stride, NF4: tl.constexpr):
    """Whether the stored values (M, N) of ``row`` (M,) and columns ``j`` (N,) are not zero."""
    if NF4:
        byte = tl.load(stored + row[:, None] * stride + (j // 2)[None, :], mask=inside, other=0).to(tl.int32)
        return (byte >> (4 - j % 2 * 4)[None, :]) & 15 != 7
    return tl.load(stored + row[:, None] * stride + j[None, :], mask=inside, other=0.0) != 0


@triton.jit(do_not_specialize=_FREE)
def keep_nonzero_kernel(
    values, stored, channels, values_stride, stored_stride, n, length, given,
    NF4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    width = tl.cdiv(length, BLOCK_N)
    m = tl.program_id(0) // width * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % width * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < n)[:, None] & (j < length)[None, :]
    nonzero = _nonzero_at(stored, index_at(channels, m, n, given), j, inside, stored_stride, NF4)
    place = values + m[:, None].to(tl.int64) * values_stride + j[None, :]
    # What is kept is neither read nor written.
    tl.store(place, tl.zeros((BLOCK_M, BLOCK_N), values.dtype.element_ty), mask=inside & (nonzero == 0))


@triton.jit(do_not_specialize=("n", "length", "rank", "scaling"))
def masked_weight_kernel(
    base, stored, p, q, out, base_stride, stored_stride, p_stride, q_stride, out_stride, n, length, rank, scaling,
    NF4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    width = tl.cdiv(length, BLOCK_N)
    m = (tl.program_id(0) // width * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = tl.program_id(0) % width * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < n)[:, None] & (j < length)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = low_rank(sums, p, q, m, j.to(tl.int64), m < n, j < length, rank, p_stride, q_stride, STEP)
    values = tl.load(base + m[:, None] * base_stride + j[None, :], mask=inside, other=0.0).to(tl.float32)
    values += sums * scaling
    nonzero = _nonzero_at(stored, m, j, inside, stored_stride, NF4)
    values = rounded(tl.where(nonzero, values, 0.0), out.dtype.element_ty)
    tl.store(out + m[:, None] * out_stride + j[None, :], values, mask=inside)


def takes(values: Tensor, stored: EncodedWeight) -> bool:
    """Whether there is a kernel: for ``values`` in bf16 or fp32 and a matrix of the same, or of NF4."""
    return values.dtype in DTYPES and (stored.nf4 or (stored.plain and stored.parts[0].dtype == values.dtype))


def keep_nonzero(values: Tensor, stored: EncodedWeight, channels: Tensor | None) -> Tensor:
    """See :func:`sparselora_kernels.nonzero.keep_nonzero`; the rows of ``values`` are contiguous."""
    own, (n, length) = unit_stride(stored.parts[0]), values.shape
    if values.numel():
        index = values.new_empty(1, dtype=torch.int64) if channels is None else channels
        with torch.cuda.device_of(values):
            keep_nonzero_kernel[_grid(n, length)](
                values, own, index, values.stride(0), own.stride(0), n, length, int(channels is not None),
                NF4=stored.nf4, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
            )  # fmt: skip
    return values


def masked_weight(base: Tensor, stored: EncodedWeight, p: Tensor, q: Tensor, scaling: float) -> Tensor:
    """See :func:`sparselora_kernels.masked_weight.masked_weight`.

    Args:
        base: (C, length) what is stored, decoded: the stored matrix itself, or a copy, which is written over.
    """
    own, (n, length) = unit_stride(stored.parts[0]), base.shape
    out = torch.empty_like(base) if stored.plain else base
    if base.numel():
        base, p, q = unit_stride(base), unit_stride(p), unit_stride(q.t())  # Both with the rank side by side.
        with torch.cuda.device_of(base):
            masked_weight_kernel[_grid(n, length)](
                base, own, p, q, out, base.stride(0), own.stride(0), p.stride(0), q.stride(0), out.stride(0),
                n, length, p.shape[1], scaling,
                NF4=stored.nf4, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STEP=RANK_STEP, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def _grid(n: int, length: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK_M) * triton.cdiv(length, BLOCK_N),)


def variants() -> Iterator[Variant]:
    """Both, in every dtype, over a matrix of the same dtype and of NF4."""
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    for dtype in DTYPES:
        for nf4 in (False, True):
            name, stored = f"*{TYPE_NAMES[dtype]}", "*u8" if nf4 else f"*{TYPE_NAMES[dtype]}"
            words = f"{TYPE_NAMES[dtype]}{' nf4' if nf4 else ''}"
            strides = ("values_stride", "stored_stride")
            pointers = {"values": name, "stored": stored, "channels": "*i64"}
            yield Variant(
                kernel=keep_nonzero_kernel,
                label=f"keep_nonzero {words}",
                signature=pointers | dict.fromkeys((*strides, *_FREE), "i32"),
                constants={"NF4": nf4, **tile},
                num_warps=NUM_WARPS,
                aligned=(*pointers, *strides),
            )
            sides = ("base_stride", "stored_stride", "p_stride", "q_stride", "out_stride")
            pointers = {"base": name, "stored": stored, "p": name, "q": name, "out": name}
            yield Variant(
                kernel=masked_weight_kernel,
                label=f"masked_weight {words}",
                signature=pointers | dict.fromkeys((*sides, "n", "length", "rank"), "i32") | {"scaling": "fp32"},
                constants={"NF4": nf4, "STEP": RANK_STEP, **tile},
                num_warps=NUM_WARPS,
                matrix_units=dtype is torch.bfloat16,
                aligned=(*pointers, *sides),
            )
