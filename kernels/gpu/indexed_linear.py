"""Products with rows of X and channels of W read by index: nothing is copied out first, and nothing scattered after.

    indexed_nt    Y[rows, channels]  (+)=  X[rows] · W[channels]ᵀ + b[channels]               W: (C, in)
    indexed_nn    Y[rows]            (+)=  H · W[channels] + b + L · Bᵀ                        W: (C, out)

Sums are fp32 and rounded once, to the dtype of ``x``. Each element of the result belongs to one program, which sums in a
fixed order: repeated runs are bit-identical.

An absent index, bias or sum is a flag at run time, not another binary: what is launched is what :func:`variants` lists.
Triton would specialise on the numbers that change with every batch; they are exempted by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import dot, rounded
from .variants import Variant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NF4_BLOCK = 64
"""Values per absmax."""


class NF4Matrix(NamedTuple):
    """A (C, length) matrix of 4-bit codes, decoded inside the product, bit for bit as if decoded first.

    ``value = levels[code] · absmax``, in fp32, rounded once to the dtype of the product.
    """

    codes: Tensor
    """(C, 32·nb) uint8, nb = ceil(length / 64): two values a byte, the first in the high half."""
    absmax: Tensor
    """fp32, (k, nb) of the chosen channels in their order, or (C, nb) where all are."""
    levels: Tensor
    """(16,) fp32."""
    length: int
    """Values per row."""


Matrix: TypeAlias = "Tensor | NF4Matrix"


class Tile(NamedTuple):
    """The block of results that one program computes, the step of its sum, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    cost: float = 1.0
    """Time per multiplication against the first tile's. An estimate, not measured."""


# Tokens × channels (or outputs) × step. A first tile of 32768 sums is 128 a thread: as many as there is room for
# beside the operands, and its steps in flight fill 144 of sm_80's 163 KiB. The last tile is for few tokens or
# channels, when larger ones would leave most of the device idle. ``ragged`` is for a k that 16 does not divide, whose
# loads and stores cannot be wide, ``columns`` for columns by index, whose every element has an address of its own:
# both take registers from the sums. NF4's smaller tiles leave room for decoding; IEEE fp32 has no matrix unit.
# An index read within the loop takes a step in flight itself, hence the five stages of nn.
NT_TILES = {
    "16": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4, 1.15), Tile(64, 64, 64, 8, 4, 1.6)),
    "16 ragged": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, 1.4)),
    "16 columns": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, 1.4)),
    "16 nf4": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3, 1.6)),
    "16 nf4 ragged": (Tile(64, 64, 64, 4, 3),),
    "16 nf4 columns": (Tile(64, 64, 64, 4, 3),),
    "32": (Tile(64, 64, 16, 8, 2),),
    "32 columns": (Tile(64, 64, 16, 8, 2),),
    "32 nf4": (Tile(64, 16, 64, 8, 2),),
    "32 nf4 columns": (Tile(64, 16, 64, 8, 2),),
}
NN_TILES = {
    "16": (Tile(256, 128, 64, 8, 5), Tile(128, 128, 64, 8, 5, 1.15), Tile(64, 128, 32, 4, 5, 1.5)),
    "16 ragged": (Tile(128, 128, 64, 8, 5), Tile(64, 128, 32, 4, 5, 1.3)),
    "16 columns": (Tile(64, 128, 32, 4, 5),),
    "16 nf4": (Tile(128, 128, 64, 8, 5), Tile(64, 128, 32, 4, 5, 1.4)),
    "16 nf4 ragged": (Tile(64, 128, 32, 4, 5),),
    "16 nf4 columns": (Tile(64, 128, 32, 4, 5),),
    "32": (Tile(64, 64, 16, 8, 3),),
    "32 columns": (Tile(64, 64, 16, 8, 3),),
    "32 nf4": (Tile(32, 64, 32, 8, 2),),
    "32 nf4 columns": (Tile(32, 64, 32, 8, 2),),
}
GROUP = 8
"""Rows of tiles that run side by side, so that they share the weight's tiles in L2."""
RANK_STEP = 16
"""Step of the sum over a low rank: the least that a matrix unit takes."""

_NT_FREE = ("n", "has_rows", "has_channels", "has_bias", "scatter_rows", "accumulate")
_NN_FREE = ("n", "rank", "has_rows", "has_channels", "has_bias", "index_h", "accumulate")


@triton.jit
def tile_of(program, n, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of a program: ``GROUP`` rows of tiles, column by column, then the next rows."""
    columns = tl.cdiv(width, BLOCK_N)
    group = program // (GROUP * columns)
    height = tl.minimum(tl.cdiv(n, BLOCK_M) - group * GROUP, GROUP)
    within = program - group * GROUP * columns
    return group * GROUP + within % height, within // height


@triton.jit
def index_at(index, offsets, count, given):
    """``index[offsets]`` as int64, or ``offsets`` themselves where none is given; 0, a valid row, past the end."""
    inside = offsets < count
    chosen = tl.load(index + offsets, mask=offsets < count * given, other=0)
    return tl.where(given != 0, chosen, tl.where(inside, offsets, 0).to(tl.int64))


@triton.jit
def places(
    out, rows, channels, m, j, n, width, stride, scatter_rows, COLUMNS: tl.constexpr
):  # fmt: skip
    """Addresses of the results of tokens m and columns j, and which of them exist."""
    row = index_at(rows, m, n, scatter_rows)
    inside = (m < n)[:, None] & (j < width)[None, :]
    if COLUMNS:
        column = index_at(channels, j, width, 1)
    else:
        column = j
    return out + row[:, None] * stride + column[None, :], inside


@triton.jit
def nf4_tile(
    codes, absmax, levels, channel, position, inside, block, blocks, codes_stride, absmax_stride,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Decoded values (ROWS, 64 · BLOCKS) of rows ``channel``, from absmax ``block`` on; zero where not ``inside``."""
    block = block + tl.arange(0, BLOCKS)
    inside = inside[:, None] & (block < blocks)[None, :]
    scale = tl.load(absmax + position[:, None].to(tl.int64) * absmax_stride + block[None, :], mask=inside, other=0.0)
    byte = (block * 32)[:, None] + tl.arange(0, 32)[None, :]
    packed = tl.load(
        codes + channel[:, None, None] * codes_stride + byte[None, :, :], mask=inside[:, :, None], other=0
    ).to(tl.int32)
    table = tl.load(levels + tl.arange(0, 16))
    code = tl.join(packed >> 4, packed & 15).reshape(ROWS * BLOCKS * 64)
    values = tl.gather(table, code, 0).reshape(ROWS, BLOCKS, 64) * scale[:, :, None]
    return rounded(values, dtype).reshape(ROWS, 64 * BLOCKS)


@triton.jit
def low_rank(
    sums, low, b, low_row, b_row, low_inside, b_inside, rank, low_stride, b_stride, STEP: tl.constexpr
):  # fmt: skip
    """``sums + low[low_row] · b[b_row]ᵀ`` for any rank, zero included."""
    for start in tl.range(0, rank, STEP, num_stages=1):
        r = start + tl.arange(0, STEP)
        left = tl.load(
            low + low_row[:, None] * low_stride + r[None, :], mask=low_inside[:, None] & (r < rank)[None, :], other=0.0
        )
        right = tl.load(
            b + b_row[None, :] * b_stride + r[:, None], mask=b_inside[None, :] & (r < rank)[:, None], other=0.0
        )
        sums = dot(left, right, sums)
    return sums


@triton.jit(do_not_specialize=_NT_FREE)
def nt_kernel(
    x, weight, absmax, levels, rows, channels, bias, out,
    length, k, x_stride, weight_stride, absmax_stride, out_stride,
    n, has_rows, has_channels, has_bias, scatter_rows, accumulate,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
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
    place, inside = places(out, rows, channels, m, j, n * accumulate, k, out_stride, scatter_rows, COLUMNS)
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
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
    zero = (accumulate >> 1) * 16
    place, inside = places(out, rows, channels, m + zero, j + zero, n, k, out_stride, scatter_rows, COLUMNS)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NN_FREE)
def nn_kernel(
    h, weight, absmax, levels, rows, channels, bias, low, b, out,
    length, k, h_stride, weight_stride, absmax_stride, low_stride, b_stride, out_stride,
    n, rank, has_rows, has_channels, has_bias, index_h, accumulate,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, RANK_STEP: tl.constexpr
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), n, length, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = index_at(rows, m, n, has_rows)
    compact = tl.where(m < n, m, 0).to(tl.int64)
    h_row = h + tl.where(index_h != 0, row, compact)[:, None] * h_stride
    # What is added first and the zero: see nt_kernel.
    place, inside = places(out, rows, channels, m, j, n * accumulate, length, out_stride, has_rows, False)
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    sums += tl.load(bias + j, mask=j < length * has_bias, other=0.0).to(tl.float32)[None, :]
    sums = low_rank(
        sums, low, b, compact, j.to(tl.int64), m < n, j < length, rank, low_stride, b_stride, RANK_STEP
    )  # fmt: skip
    for start in range(0, k, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        channel = index_at(channels, c, k, has_channels)
        if COLUMNS:
            left = tl.load(h_row + channel[None, :], mask=(c < k)[None, :], other=0.0)
        else:
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
    place, inside = places(out, rows, channels, m + zero, j + zero, n, length, out_stride, has_rows, False)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def kind_of(dtype: torch.dtype, *, nf4: bool, ragged: bool = False, columns: bool = False) -> str:
    """Key of a table of tiles."""
    words = ["16" if dtype.itemsize == 2 else "32"]
    words += ["nf4"] if nf4 else []
    # fp32 products have the same tile for a ragged k.
    words += ["columns"] if columns else ["ragged"] if ragged and dtype.itemsize == 2 else []
    return " ".join(words)


def choose(tiles: tuple[Tile, ...], n: int, width: int, device: torch.device) -> Tile:
    """The tile that covers n × width results soonest: rounds of programs × a program's time."""
    processors = _multiprocessors(device)

    def time(tile: Tile) -> float:
        programs = triton.cdiv(n, tile.m) * triton.cdiv(width, tile.n)
        return triton.cdiv(programs, processors) * tile.m * tile.n * tile.cost

    return min(tiles, key=time)


def unpack(weight: Matrix, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Data, absmax and levels (``None`` for a plain matrix), and values per row.

    Raises:
        ValueError: a dtype of ``x`` that has no kernel, or a plain weight of another one.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"no indexed product in {x.dtype}: bfloat16, float16 or float32")
    if isinstance(weight, NF4Matrix):
        return unit_stride(weight.codes), unit_stride(weight.absmax), weight.levels, weight.length
    if weight.dtype != x.dtype:
        raise ValueError(f"the weight is {weight.dtype}, x is {x.dtype}: the indexed products take one dtype")
    return unit_stride(weight), None, None, weight.shape[1]


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with its rows contiguous; they may lie apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def factors(low: Tensor | None, b: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """The factors of a low-rank product and its rank; ``x``, which is not read, and 0 where there is none.

    Raises:
        ValueError: one without the other, or of another dtype than ``x``.
    """
    if low is None and b is None:
        return x, x, 0
    if low is None or b is None:
        raise ValueError("low and b go together: the product low · bᵀ")
    if not low.dtype == b.dtype == x.dtype:
        raise ValueError(f"low is {low.dtype}, b is {b.dtype}, x is {x.dtype}: the indexed products take one dtype")
    return unit_stride(low), unit_stride(b), low.shape[1]


def check_rows(out: Tensor) -> None:
    """Raises ValueError: the rows of ``out``, which is written in place, are not contiguous."""
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"the rows of out must be contiguous, its strides are {out.stride()}")


def count_of(index: Tensor | None, otherwise: int) -> int:
    return otherwise if index is None else index.shape[0]


def stride_of(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def constants_of(tile: Tile, absent: tuple[str, ...]) -> dict[str, object]:
    """Constexpr parameters of a kernel with this tile, ``absent`` pointers included."""
    shape = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP}
    return {**shape, **dict.fromkeys(absent)}


def indexed_nt(
    x: Tensor,
    weight: Matrix,
    rows: Tensor | None,
    channels: Tensor | None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``x[rows] · weight[channels]ᵀ + bias[channels]``, into a compact result or into its places in ``out``.

    Args:
        x: (T, in) bf16, fp16 or fp32.
        weight: (C, in) in ``x.dtype``, or NF4.
        rows: (n,) int64, each at most once; ``None`` for all T.
        channels: (k,) int64, each at most once; ``None`` for all C.
        bias: (C,).
        out: (T, C) in ``x.dtype``: ``out[rows[:, None], channels]`` is written and nothing else.
        accumulate: add to ``out`` instead; in fp32, rounded once.

    Returns:
        ``out``, or (n, k) in ``x.dtype`` without it.

    Raises:
        ValueError: dtypes that differ or have no kernel, ``accumulate`` without ``out``, rows of ``out`` not contiguous.
    """
    if accumulate and out is None:
        raise ValueError("accumulate=True needs the tensor to add to: out")
    if out is not None:
        check_rows(out)
    x = unit_stride(x)
    data, absmax, levels, length = unpack(weight, x)
    n, k = count_of(rows, x.shape[0]), count_of(channels, data.shape[0])
    scatter = out is not None
    y = x.new_empty(n, k) if out is None else out
    if not (n and k):
        return y
    columns = scatter and channels is not None
    nf4 = absmax is not None
    tile = choose(NT_TILES[kind_of(x.dtype, nf4=nf4, ragged=k % 16 > 0, columns=columns)], n, k, x.device)
    absent = x.new_empty(1, dtype=torch.int64)
    with torch.cuda.device_of(x):
        nt_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(k, tile.n),)](
            x, data, absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels,
            x if bias is None else bias.to(x.dtype), y,
            length, k, x.stride(0), data.stride(0), stride_of(absmax), y.stride(0),
            n, int(rows is not None), int(channels is not None), int(bias is not None),
            int(scatter and rows is not None), int(accumulate),
            columns, tile.m, tile.n, tile.k, GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def indexed_nn(
    h: Tensor,
    weight: Matrix,
    rows: Tensor | None,
    channels: Tensor | None,
    out: Tensor,
    *,
    indexed: bool,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``out[rows] (+)= H · weight[channels] + bias + low · bᵀ``; other rows of ``out`` stay as they are.

    Args:
        h: bf16, fp16 or fp32; (n, k) compact, or (T, C) where ``indexed``, and then ``H = h[rows][:, channels]``.
        weight: (C, out) in ``h.dtype``, or NF4.
        rows: (n,) int64, each at most once; ``None`` for all T.
        channels: (k,) int64, each at most once; ``None`` for all C.
        out: (T, out) in ``h.dtype``.
        bias: (out,).
        low, b: (n, R) compact and (out, R) in ``h.dtype``, R of any size.
        accumulate: add to ``out``; in fp32, rounded once.

    Returns:
        ``out``.

    Raises:
        ValueError: dtypes that differ or have no kernel, a low-rank factor without its pair, rows of ``out`` not
            contiguous.
    """
    check_rows(out)
    h = unit_stride(h)
    low, b, rank = factors(low, b, h)
    data, absmax, levels, length = unpack(weight, h)
    n, k = count_of(rows, out.shape[0]), count_of(channels, data.shape[0])
    if not (n and length):
        return out
    columns = indexed and channels is not None
    nf4 = absmax is not None
    tile = choose(NN_TILES[kind_of(h.dtype, nf4=nf4, ragged=k % 16 > 0, columns=columns)], n, length, h.device)
    absent = h.new_empty(1, dtype=torch.int64)
    with torch.cuda.device_of(h):
        nn_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(length, tile.n),)](
            h, data, absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels,
            h if bias is None else bias.to(h.dtype), low, b, out,
            length, k, h.stride(0), data.stride(0), stride_of(absmax),
            low.stride(0), b.stride(0), out.stride(0),
            n, rank, int(rows is not None), int(channels is not None), int(bias is not None), int(indexed),
            int(accumulate),
            columns, tile.m, tile.n, tile.k, GROUP, RANK_STEP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def prefers_vendor(n: int, k: int, length: int, dtype: torch.dtype, *, nf4: bool = False) -> bool:
    """Whether to copy rows and multiply with the vendor's GEMM instead: a rule by arithmetic, **not yet measured**.

    For n tokens, k channels and the other side of the product, ``length``:

        indexed  2·n·k·length / rate
        vendor   2·n·k·length / vendor rate + 2·(n + k)·length·bytes / 3 TB/s + 3 launches of 3 µs

    The copies of rows of X (or of the result) and of W are read and written once. Rates assumed on H100, vendor and
    indexed: bf16 700 and 450 TFLOP/s, fp32 50 and 20, and 200 for NF4 in 16 bits, which every tile of tokens decodes
    again. Launches aside, ``length`` cancels: in bf16 the vendor wins where n·k / (n + k) is above about 840.
    """
    vendor_rate, rate = (700e12, 200e12 if nf4 else 450e12) if dtype.itemsize == 2 else (50e12, 20e12)
    operations = 2.0 * n * k * length
    copies = 2.0 * (n + k) * length * dtype.itemsize / 3e12 + 3 * 3e-6
    return operations / rate > operations / vendor_rate + copies


def copied_rows(weight: Matrix, channels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight[channels]`` (k, length) in ``dtype``, decoded if NF4: by torch, for the vendor forms."""
    if not isinstance(weight, NF4Matrix):
        return (weight if channels is None else weight.index_select(0, channels)).to(dtype)
    codes = weight.codes if channels is None else weight.codes.index_select(0, channels)
    pairs = torch.stack([codes >> 4, codes & 15], -1).view(codes.shape[0], -1, NF4_BLOCK)
    values = weight.levels[pairs.int()] * weight.absmax[:, :, None]
    return values.view(codes.shape[0], -1)[:, : weight.length].to(dtype)


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _into(out: Tensor, rows: Tensor | None, y: Tensor, accumulate: bool) -> Tensor:
    """``out[rows] (+)= y``; without atomics, because the rows are distinct."""
    y = y + _rows_of(out, rows) if accumulate else y
    return out.copy_(y) if rows is None else out.index_copy_(0, rows, y)


def vendor_nt(
    x: Tensor,
    weight: Matrix,
    rows: Tensor | None,
    channels: Tensor | None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """:func:`indexed_nt` by copied rows and the vendor's GEMM; ``accumulate`` rounds twice."""
    if bias is not None:
        bias = (bias if channels is None else bias.index_select(0, channels)).to(x.dtype)
    y = torch.nn.functional.linear(_rows_of(x, rows), copied_rows(weight, channels, x.dtype), bias)
    if out is None:
        return y
    if channels is not None:
        before = _rows_of(out, rows)
        y = y + before.index_select(1, channels) if accumulate else y
        y, accumulate = before.index_copy(1, channels, y), False
    return _into(out, rows, y, accumulate)


def vendor_nn(
    h: Tensor,
    weight: Matrix,
    rows: Tensor | None,
    channels: Tensor | None,
    out: Tensor,
    *,
    indexed: bool,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """:func:`indexed_nn` by copied rows and the vendor's GEMM; rounds after each product."""
    if indexed:
        h = _rows_of(h, rows)
        h = h if channels is None else h.index_select(1, channels)
    kept = copied_rows(weight, channels, h.dtype)
    y = h @ kept if bias is None else torch.addmm(bias.to(h.dtype), h, kept)
    if low is not None and b is not None:
        y = torch.addmm(y, low, b.t())
    return _into(out, rows, y, accumulate)


_TYPES = {"rows": "*i64", "channels": "*i64", "absmax": "*fp32", "levels": "*fp32", "gate_absmax": "*fp32"}
_TYPES |= {"up_absmax": "*fp32"}
_MATRICES = ("weight", "gate", "up")


def variant(
    kernel: triton.JITFunction, kind: str, tile: Tile, constants: dict[str, object], unaligned: tuple[str, ...]
) -> Variant:
    """A kernel whose parameters are pointers up to ``out`` and integers after it, with one tile."""
    names = [name for name in kernel.arg_names if name not in constants]
    place = names.index("out") + 1
    element = "bf16" if kind.startswith("16") else "fp32"
    types = _TYPES | (dict.fromkeys(_MATRICES, "*u8") if "nf4" in kind else {})
    pointers = {name: types.get(name, f"*{element}") for name in names[:place]}
    words = [kernel.__name__.removesuffix("_kernel"), element, *kind.split()[1:], f"{tile.m}x{tile.n}x{tile.k}"]
    return Variant(
        kernel=kernel,
        label=" ".join(words),
        signature=pointers | dict.fromkeys(names[place:], "i32"),
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        matrix_units=element == "bf16",
        aligned=tuple(name for name in names if name not in unaligned),
    )


def variants() -> Iterator[Variant]:
    """Every tile of both tables, in bf16 and fp32; fp16 has bf16's, but for the type.

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
                constants["COLUMNS"] = "columns" in kind
                if kernel is nn_kernel:
                    constants["RANK_STEP"] = RANK_STEP
                yield variant(kernel, kind, tile, constants, free + ((compact, "k") if "ragged" in kind else ()))
