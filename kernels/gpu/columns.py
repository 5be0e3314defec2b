"""Columns by index in Triton; what it is for in :mod:`sparselora_kernels.columns`.

A program copies a tile. Ascending channels of one row lie close: at a quarter of them every 32 bytes that are read hold
four, and what one load instruction leaves of them the next finds in L1. The compact side is read and written widely.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .indexing import index_at
from .matrix import check_rows, unit_stride
from .tiles import rounded
from .variants import TYPE_NAMES, Variant

# Tokens × channels of a program, 8 values a thread: with 16, ptxas spills to fit more programs.
BLOCK_M, BLOCK_N, NUM_WARPS = 8, 128, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FREE = ("n", "k")


@triton.jit(do_not_specialize=_FREE)
def gather_kernel(
    x, rows, channels, y, x_stride, y_stride, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    width = tl.cdiv(k, BLOCK_N)
    m = tl.program_id(0) // width * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % width * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < n)[:, None] & (j < k)[None, :]
    at = index_at(rows, m, n, 1)[:, None] * x_stride + index_at(channels, j, k, 1)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    tl.store(y + m[:, None].to(tl.int64) * y_stride + j[None, :], values, mask=inside)


@triton.jit(do_not_specialize=(*_FREE, "accumulate"))
def scatter_kernel(
    y, rows, channels, out, y_stride, out_stride, n, k, accumulate, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    width = tl.cdiv(k, BLOCK_N)
    m = tl.program_id(0) // width * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % width * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < n)[:, None] & (j < k)[None, :]
    values = tl.load(y + m[:, None].to(tl.int64) * y_stride + j[None, :], mask=inside, other=0.0).to(tl.float32)
    place = out + index_at(rows, m, n, 1)[:, None] * out_stride + index_at(channels, j, k, 1)[None, :]
    added = (m < n * accumulate)[:, None] & (j < k)[None, :]
    values += tl.load(place, mask=added, other=0.0).to(tl.float32)
    tl.store(place, rounded(values, out.dtype.element_ty), mask=inside)


def gather(x: Tensor, rows: Tensor, channels: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.columns.gather`."""
    x = unit_stride(x)
    n, k = rows.shape[0], channels.shape[0]
    y = x.new_empty(n, k)
    if n and k:
        with torch.cuda.device_of(x):
            gather_kernel[_grid(n, k)](
                x, rows, channels, y, x.stride(0), y.stride(0), n, k, BLOCK_M, BLOCK_N, num_warps=NUM_WARPS
            )  # fmt: skip
    return y


def scatter(y: Tensor, rows: Tensor, channels: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """See :func:`sparselora_kernels.columns.scatter`.

    Raises:
        ValueError: rows of ``out`` not contiguous.
    """
    check_rows(out)
    y = unit_stride(y)
    n, k = y.shape
    if n and k:
        with torch.cuda.device_of(out):
            scatter_kernel[_grid(n, k)](
                y, rows, channels, out, y.stride(0), out.stride(0), n, k, int(accumulate), BLOCK_M, BLOCK_N,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def _grid(n: int, k: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK_M) * triton.cdiv(k, BLOCK_N),)


def variants() -> Iterator[Variant]:
    """Both, in every dtype, with rows of the compact side that 16 divides and others."""
    for kernel, sides, flags in ((gather_kernel, ("x", "y"), ()), (scatter_kernel, ("y", "out"), ("accumulate",))):
        for dtype in DTYPES:
            for ragged in (False, True):
                name, strides = TYPE_NAMES[dtype], [f"{side}_stride" for side in sides]
                pointers = {sides[0]: f"*{name}", "rows": "*i64", "channels": "*i64", sides[1]: f"*{name}"}
                words = [kernel.__name__.removesuffix("_kernel"), name, *(["ragged"] if ragged else [])]
                yield Variant(
                    kernel=kernel,
                    label=" ".join(words),
                    signature=pointers | dict.fromkeys((*strides, *_FREE, *flags), "i32"),
                    constants={"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
                    num_warps=NUM_WARPS,
                    aligned=(*pointers, *(side for side in strides if not (ragged and side == "y_stride"))),
                )
