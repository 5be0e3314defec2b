"""Products with rows of X and channels of W read by index: nothing is copied out first, and nothing scattered after.

    indexed_nt    Y            =  X[rows] · W[channels]ᵀ + b[channels]      W: (C, in)
    indexed_nn    Y[rows]  (+)=  H · W[channels] + b + L · Bᵀ               W: (C, out)

Sums are fp32 and rounded once, to the dtype of ``x``. Each element of the result belongs to one program, which sums in a
fixed order: repeated runs are bit-identical.

An absent index, bias or sum is a flag at run time, not another binary: what is launched is what :func:`variants` lists.
Triton would specialise on the numbers that change with every batch; they are exempted by name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import NNOperands, NTOperands
from .indexing import index_at, low_rank, nf4_tile, places, tile_of
from .matrix import Matrix, any_index, check_rows, count_of, factors, stride_of, unit_stride, unpack
from .tiles import dot, rounded
from .tiling import GROUP, RANK_STEP, Tile, choose, constants_of, kind_of, variant
from .variants import Variant

# Tokens × channels (or outputs) × step. A first tile of 32768 sums is 128 a thread: as many as there is room for
# beside the operands, and its steps in flight fill 144 of sm_80's 163 KiB. The last tile is for few tokens or
# channels, when larger ones would leave most of the device idle. ``ragged`` is for a k that 16 does not divide, whose
# loads and stores cannot be wide, which takes registers from the sums. NF4's smaller tiles leave room for decoding; IEEE
# fp32 has no matrix unit.
# An index read within the loop takes a step in flight itself, hence the five stages of nn.
NT_TILES = {
    "16": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4, 1.15), Tile(64, 64, 64, 8, 4, 1.6)),
    "16 ragged": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, 1.4)),
    "16 nf4": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3, 1.6)),
    "16 nf4 ragged": (Tile(64, 64, 64, 4, 3),),
    "32": (Tile(64, 64, 16, 8, 2),),
    "32 nf4": (Tile(64, 16, 64, 8, 2),),
}
NN_TILES = {
    "16": (Tile(256, 128, 64, 8, 5), Tile(128, 128, 64, 8, 5, 1.15), Tile(64, 128, 32, 4, 5, 1.5)),
    "16 ragged": (Tile(128, 128, 64, 8, 5), Tile(64, 128, 32, 4, 5, 1.3)),
    "16 nf4": (Tile(128, 128, 64, 8, 5), Tile(64, 128, 32, 4, 5, 1.4)),
    "16 nf4 ragged": (Tile(64, 128, 32, 4, 5),),
    "32": (Tile(64, 64, 16, 8, 2),),
    "32 nf4": (Tile(32, 64, 32, 8, 2),),
}

_NT_FREE = ("n", "has_rows", "has_channels", "has_bias")
_NN_FREE = ("n", "rank", "has_rows", "has_channels", "has_bias", "accumulate")


@triton.jit(do_not_specialize=_NT_FREE)
def nt_kernel(
    x, weight, absmax, levels, rows, channels, bias, out,
    length, k, x_stride, weight_stride, absmax_stride, out_stride,
    n, has_rows, has_channels, has_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), n, k, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end both are row 0: what is computed from it is not stored.
    row = index_at(rows, m, n, has_rows)
    channel = index_at(channels, j, k, has_channels)
    x_row = x + row[:, None] * x_stride
    weight_row = weight + channel[None, :] * weight_stride
    # What is added comes first: after the sum there would be no registers left for it.
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums += tl.load(bias + channel, mask=j < k * has_bias, other=0.0).to(tl.float32)[None, :]
    for start in range(0, length, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        left = tl.load(x_row + i[None, :], mask=(i < length)[None, :], other=0.0)
        if absmax is None:
            right = tl.load(weight_row + i[:, None], mask=(i < length)[:, None], other=0.0)
        else:
            right = nf4_tile(
                weight, absmax, levels, channel, j, j < k, start // 64, tl.cdiv(length, 64),
                weight_stride, absmax_stride, BLOCK_K // 64, BLOCK_N, x.dtype.element_ty
            ).trans()  # fmt: skip
        sums = dot(left, right, sums)
    # Zero, which the compiler cannot know: it would keep all addresses in registers through the sum.
    zero = (has_rows >> 1) * 16
    place, inside = places(out, rows, m + zero, j + zero, n, k, out_stride, 0)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NN_FREE)
def nn_kernel(
    h, weight, absmax, levels, rows, channels, bias, low, b, out,
    length, k, h_stride, weight_stride, absmax_stride, low_stride, b_stride, out_stride,
    n, rank, has_rows, has_channels, has_bias, accumulate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, RANK_STEP: tl.constexpr
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), n, length, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    compact = tl.where(m < n, m, 0).to(tl.int64)
    # What is added first and the zero: see nt_kernel.
    place, inside = places(out, rows, m, j, n * accumulate, length, out_stride, has_rows)
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    sums += tl.load(bias + j, mask=j < length * has_bias, other=0.0).to(tl.float32)[None, :]
    sums = low_rank(
        sums, low, b, compact, j.to(tl.int64), m < n, j < length, rank, low_stride, b_stride, RANK_STEP
    )  # fmt: skip
    h_row = h + compact[:, None] * h_stride
    for start in range(0, k, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        channel = index_at(channels, c, k, has_channels)
        left = tl.load(h_row + c[None, :], mask=(c < k)[None, :], other=0.0)
        if absmax is None:
            right = tl.load(
                weight + channel[:, None] * weight_stride + j[None, :],
                mask=(c < k)[:, None] & (j < length)[None, :],
                other=0.0,
            )
        else:
            right = nf4_tile(
                weight, absmax, levels, channel, c, c < k, tile_n * (BLOCK_N // 64), tl.cdiv(length, 64),
                weight_stride, absmax_stride, BLOCK_N // 64, BLOCK_K, h.dtype.element_ty
            )  # fmt: skip
        sums = dot(left, right, sums)
    zero = (accumulate >> 1) * 16
    place, inside = places(out, rows, m + zero, j + zero, n, length, out_stride, has_rows)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


def indexed_nt(operands: NTOperands, weight: Matrix) -> Tensor:
    """The product of :class:`NTOperands` with ``weight`` (C, in), in bf16 or fp32.

    Returns:
        (n, k) in ``x.dtype``.

    Raises:
        ValueError: dtypes that differ or have no kernel.
    """
    x, rows, channels, bias = operands
    x = unit_stride(x)
    data, absmax, levels, length = unpack(weight, x)
    n, k = count_of(rows, x.shape[0]), count_of(channels, data.shape[0])
    y = x.new_empty(n, k)
    if not (n and k):
        return y
    kind = kind_of(x.dtype, nf4=absmax is not None, ragged=k % 16 > 0)
    tile = choose(NT_TILES, kind, "nt", n, k, x.device)
    absent = any_index(rows, channels, x)
    with torch.cuda.device_of(x):
        nt_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(k, tile.n),)](
            x, data, absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels,
            x if bias is None else bias.to(x.dtype), y,
            length, k, x.stride(0), data.stride(0), stride_of(absmax), y.stride(0),
            n, int(rows is not None), int(channels is not None), int(bias is not None),
            tile.m, tile.n, tile.k, GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def indexed_nn(operands: NNOperands, weight: Matrix) -> Tensor:
    """The product of :class:`NNOperands` with ``weight`` (C, out), in bf16 or fp32; ``accumulate`` adds in fp32.

    Returns:
        ``out``.

    Raises:
        ValueError: dtypes that differ or have no kernel, a low-rank factor without its pair, rows of ``out`` not
            contiguous.
    """
    h, rows, channels, out, bias, low, b, accumulate = operands
    check_rows(out)
    h = unit_stride(h)
    low, b, rank = factors(low, b, h)
    data, absmax, levels, length = unpack(weight, h)
    n, k = count_of(rows, out.shape[0]), count_of(channels, data.shape[0])
    if not (n and length):
        return out
    kind = kind_of(h.dtype, nf4=absmax is not None, ragged=k % 16 > 0)
    tile = choose(NN_TILES, kind, "nn", n, length, h.device)
    absent = any_index(rows, channels, h)
    with torch.cuda.device_of(h):
        nn_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(length, tile.n),)](
            h, data, absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels,
            h if bias is None else bias.to(h.dtype), low, b, out,
            length, k, h.stride(0), data.stride(0), stride_of(absmax),
            low.stride(0), b.stride(0), out.stride(0),
            n, rank, int(rows is not None), int(channels is not None), int(bias is not None), int(accumulate),
            tile.m, tile.n, tile.k, GROUP, RANK_STEP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """Every tile of both tables, in bf16 and fp32.

    Widths and strides are aligned here (k and its stride are not where ``ragged``), as those of real models are;
    Triton makes others, with narrower loads, when it meets them.
    """
    for kernel, tables, free, compact in (
        (nt_kernel, NT_TILES, _NT_FREE, "out_stride"),
        (nn_kernel, NN_TILES, _NN_FREE, "h_stride"),
    ):
        for kind, tiles in tables.items():
            for tile in tiles:
                constants = constants_of(tile, ("absmax", "levels") if "nf4" not in kind else ())
                if kernel is nn_kernel:
                    constants["RANK_STEP"] = RANK_STEP
                yield variant(kernel, kind, tile, constants, free + ((compact, "k") if "ragged" in kind else ()))
