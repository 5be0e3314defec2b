"""The gated FFN of context tokens at its kept channels: gate and up from one read of X.

    g = X[rows] · Wg[channels]ᵀ + bg + Lg · Bgᵀ,  u likewise,  h = act(g) · u     Wg, Wu: (C, H)

``h`` is made from g and u as they are returned, rounded: backward, which has those only, then differentiates exactly
what forward computed, and ``act(g) · u`` made again from them is bit-identical to ``h``.

Sums are fp32, in a fixed order, one program for each element. See :mod:`.indexed_linear` for flags and NF4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS, check_activation
from .activations import activate
from .indexing import index_at, low_rank, nf4_tile, tile_of
from .matrix import Matrix, count_of, factors, stride_of, unit_stride, unpack_pair
from .tiles import dot, rounded
from .tiling import GROUP, RANK_STEP, Tile, choose, constants_of, kind_of, variant
from .variants import Variant

# As in indexed_linear.py. Forward has two sums, of gate and up: 128 × 64 each is one product of 128 × 128 (twice that
# spills on sm_80, which keeps operands in registers too).
FORWARD_TILES = {
    "16": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, 1.3)),
    "16 ragged": (Tile(64, 64, 64, 4, 4),),
    "16 nf4": (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3, 1.5)),
    "16 nf4 ragged": (Tile(64, 64, 64, 8, 3),),  # With 4 warps gelu spills on sm_100.
    "32": (Tile(64, 32, 16, 8, 3),),
    "32 nf4": (Tile(32, 16, 64, 8, 2),),
}
_FORWARD_FREE = ("n", "gate_rank", "up_rank", "has_rows", "has_channels", "has_gate_bias", "has_up_bias")


@triton.jit(do_not_specialize=_FORWARD_FREE)
def gated_forward_kernel(
    x, gate, gate_absmax, up, up_absmax, levels, rows, channels,
    gate_bias, up_bias, gate_low, gate_b, up_low, up_b, g, u, out,
    length, k, x_stride, gate_stride, up_stride, gate_absmax_stride, up_absmax_stride,
    gate_low_stride, gate_b_stride, up_low_stride, up_b_stride, out_stride,
    n, gate_rank, up_rank, has_rows, has_channels, has_gate_bias, has_up_bias,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, RANK_STEP: tl.constexpr
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), n, k, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end both are row 0: what is computed from it is not stored.
    row = index_at(rows, m, n, has_rows)
    channel = index_at(channels, j, k, has_channels)
    # What is added comes first: after the sums there would be no registers left for it.
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g_sums = zeros + tl.load(gate_bias + channel, mask=j < k * has_gate_bias, other=0.0).to(tl.float32)[None, :]
    u_sums = zeros + tl.load(up_bias + channel, mask=j < k * has_up_bias, other=0.0).to(tl.float32)[None, :]
    g_sums = low_rank(
        g_sums, gate_low, gate_b, row, channel, m < n, j < k, gate_rank, gate_low_stride, gate_b_stride, RANK_STEP
    )  # fmt: skip
    u_sums = low_rank(
        u_sums, up_low, up_b, row, channel, m < n, j < k, up_rank, up_low_stride, up_b_stride, RANK_STEP
    )  # fmt: skip
    if gate_absmax is not None:
        # Without it the sums have two origins after the loop, and ptxas serialises the wgmma (C7511).
        tl.assume(length > 0)
    x_row = x + row[:, None] * x_stride
    gate_row = gate + channel[None, :] * gate_stride
    up_row = up + channel[None, :] * up_stride
    for start in range(0, length, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        left = tl.load(x_row + i[None, :], mask=(i < length)[None, :], other=0.0)
        if gate_absmax is None:
            g_right = tl.load(gate_row + i[:, None], mask=(i < length)[:, None], other=0.0)
            u_right = tl.load(up_row + i[:, None], mask=(i < length)[:, None], other=0.0)
            g_sums = dot(left, g_right, g_sums)
            u_sums = dot(left, u_right, u_sums)
        else:
            g_right = nf4_tile(
                gate, gate_absmax, levels, channel, j, j < k, start // 64, tl.cdiv(length, 64),
                gate_stride, gate_absmax_stride, BLOCK_K // 64, BLOCK_N, x.dtype.element_ty
            ).trans()  # fmt: skip
            g_sums = dot(left, g_right, g_sums)
            u_right = nf4_tile(
                up, up_absmax, levels, channel, j, j < k, start // 64, tl.cdiv(length, 64),
                up_stride, up_absmax_stride, BLOCK_K // 64, BLOCK_N, x.dtype.element_ty
            ).trans()  # fmt: skip
            u_sums = dot(left, u_right, u_sums)
    # Zero, which the compiler cannot know: see nt_kernel.
    zero = (has_rows >> 1) * 16
    m += zero
    j += zero
    place = m[:, None].to(tl.int64) * out_stride + j[None, :]
    inside = (m < n)[:, None] & (j < k)[None, :]
    g_rounded = rounded(g_sums, out.dtype.element_ty)
    u_rounded = rounded(u_sums, out.dtype.element_ty)
    h = activate(g_rounded.to(tl.float32), ACTIVATION) * u_rounded.to(tl.float32)
    tl.store(g + place, g_rounded, mask=inside)
    tl.store(u + place, u_rounded, mask=inside)
    tl.store(out + place, rounded(h, out.dtype.element_ty), mask=inside)


def gated_forward(
    x: Tensor,
    rows: Tensor | None,
    gate: Matrix,
    up: Matrix,
    channels: Tensor | None,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_low: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_low: Tensor | None = None,
    up_b: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and their gated product for the chosen tokens and channels.

    Args:
        x: (T, H) bf16 or fp32.
        rows: (n,) int64, or ``None`` for all T.
        gate, up: (C, H) in ``x.dtype``, or both NF4.
        channels: (k,) int64, or ``None`` for all C.
        gate_bias, up_bias: (C,).
        gate_low, up_low: (T, R) in ``x.dtype``, of all tokens, any scale included.
        gate_b, up_b: (C, R) in ``x.dtype``.
        activation: one of ``ACTIVATIONS``.

    Returns:
        ``(g, u, h)``, each (n, k) in ``x.dtype``; ``h`` from g and u as rounded.

    Raises:
        ValueError: an unknown activation, dtypes that differ, NF4 beside plain, a low-rank factor without its pair.
    """
    check_activation(activation)
    x = unit_stride(x)
    gate_low, gate_b, gate_rank = factors(gate_low, gate_b, x)
    up_low, up_b, up_rank = factors(up_low, up_b, x)
    gate_data, gate_absmax, up_data, up_absmax, levels, length = unpack_pair(gate, up, x)
    n, k = count_of(rows, x.shape[0]), count_of(channels, gate_data.shape[0])
    g, u, h = x.new_empty(n, k), x.new_empty(n, k), x.new_empty(n, k)
    if not (n and k):
        return g, u, h
    kind = kind_of(x.dtype, nf4=levels is not None, ragged=k % 16 > 0)
    tile = choose(FORWARD_TILES, kind, "gated", n, k, x.device)
    absent = x.new_empty(1, dtype=torch.int64)
    with torch.cuda.device_of(x):
        gated_forward_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(k, tile.n),)](
            x, gate_data, gate_absmax, up_data, up_absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels,
            x if gate_bias is None else gate_bias.to(x.dtype), x if up_bias is None else up_bias.to(x.dtype),
            gate_low, gate_b, up_low, up_b, g, u, h,
            length, k, x.stride(0), gate_data.stride(0), up_data.stride(0), stride_of(gate_absmax),
            stride_of(up_absmax), gate_low.stride(0), gate_b.stride(0), up_low.stride(0), up_b.stride(0), h.stride(0),
            n, gate_rank, up_rank, int(rows is not None), int(channels is not None),
            int(gate_bias is not None), int(up_bias is not None),
            activation, tile.m, tile.n, tile.k, GROUP, RANK_STEP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return g, u, h


def variants() -> Iterator[Variant]:
    """Every tile with every activation, in bf16 and fp32."""
    for kind, tiles in FORWARD_TILES.items():
        for tile in tiles:
            absent = () if "nf4" in kind else ("gate_absmax", "up_absmax", "levels")
            for activation in ACTIVATIONS:
                constants = constants_of(tile, absent) | {"ACTIVATION": activation, "RANK_STEP": RANK_STEP}
                unaligned = _FORWARD_FREE + (("k", "out_stride") if "ragged" in kind else ())
                yield variant(gated_forward_kernel, f"{kind} {activation}", tile, constants, unaligned)
