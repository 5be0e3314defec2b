"""Parts that the kernels of indexed products share: a program's tile, rows by index, NF4 rows, low-rank sums."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, rounded


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
def places(out, rows, m, j, n, width, stride, given):
    """Addresses of the results of tokens m, or of their ``rows`` where given, and columns j, and which of them exist."""
    return out + index_at(rows, m, n, given)[:, None] * stride + j[None, :], (m < n)[:, None] & (j < width)[None, :]


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
