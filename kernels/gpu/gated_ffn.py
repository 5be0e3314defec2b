"""The gated FFN of context tokens at its kept channels: gate and up from one read of X, and their gradients.

    gated_forward           g = X[rows] · Wg[channels]ᵀ + bg + Lg · Bgᵀ,  u likewise,  h = act(g) · u     Wg, Wu: (C, H)
    gated_backward          dg = dh · u · act'(g),  du = dh · act(g)
    gated_input_gradient    out[rows] (+)= dg · Wg[channels] + du · Wu[channels]

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

from .activations import activate
from .indexed_linear import (
    GROUP,
    RANK_STEP,
    Matrix,
    NF4Matrix,
    Tile,
    check_rows,
    choose,
    constants_of,
    count_of,
    factors,
    index_at,
    kind_of,
    low_rank,
    nf4_tile,
    places,
    stride_of,
    tile_of,
    unit_stride,
    unpack,
    variant,
)
from .tiles import dot, rounded
from .variants import TYPE_NAMES, Variant

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# As in indexed_linear.py. Forward has two sums, of gate and up: 128 × 64 each is one product of 128 × 128 (twice that
# spills on sm_80, which keeps operands in registers too).
FORWARD_TILES = {
    "16": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, 1.3)),
    "16 ragged": (Tile(64, 64, 64, 4, 4),),
    "16 nf4": (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3, 1.5)),
    "16 nf4 ragged": (Tile(64, 64, 64, 4, 3),),
    "32": (Tile(64, 32, 16, 8, 3),),
    "32 nf4": (Tile(32, 16, 64, 8, 2),),
}
GRADIENT_TILES = {
    "16": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 4, 3, 1.4)),
    "16 ragged": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3, 1.2)),
    "16 nf4": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3, 1.2)),
    "16 nf4 ragged": (Tile(64, 128, 32, 4, 3),),
    "32": (Tile(64, 64, 16, 8, 3),),
    "32 nf4": (Tile(32, 64, 16, 8, 2),),
}
BLOCK = 1024
"""Elements per program of gated_backward."""

_FORWARD_FREE = ("n", "gate_rank", "up_rank", "has_rows", "has_channels", "has_gate_bias", "has_up_bias")
_GRADIENT_FREE = ("n", "has_rows", "has_channels", "accumulate")


@triton.jit
def activate_gradient(x, NAME: tl.constexpr):
    """act'(x), fp32; relu's is 0 at 0."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif NAME == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(NAME == "relu", "unknown activation")
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


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


@triton.jit(do_not_specialize=["size"])
def gated_backward_kernel(dh, g, u, dg, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(g + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + i, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(dg + i, rounded(grad * up * activate_gradient(gate, ACTIVATION), dg.dtype.element_ty), mask=inside)
    tl.store(out + i, rounded(grad * activate(gate, ACTIVATION), out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_GRADIENT_FREE)
def gated_input_gradient_kernel(
    dg, du, gate, gate_absmax, up, up_absmax, levels, rows, channels, out,
    length, k, dg_stride, du_stride, gate_stride, up_stride, gate_absmax_stride, up_absmax_stride, out_stride,
    n, has_rows, has_channels, accumulate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), n, length, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    compact = tl.where(m < n, m, 0).to(tl.int64)
    # What is added first and the zero: see nt_kernel.
    place, inside = places(out, rows, channels, m, j, n * accumulate, length, out_stride, has_rows, False)
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, k, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        channel = index_at(channels, c, k, has_channels)
        dg_tile = tl.load(dg + compact[:, None] * dg_stride + c[None, :], mask=(c < k)[None, :], other=0.0)
        du_tile = tl.load(du + compact[:, None] * du_stride + c[None, :], mask=(c < k)[None, :], other=0.0)
        if gate_absmax is None:
            read = (c < k)[:, None] & (j < length)[None, :]
            gate_tile = tl.load(gate + channel[:, None] * gate_stride + j[None, :], mask=read, other=0.0)
            up_tile = tl.load(up + channel[:, None] * up_stride + j[None, :], mask=read, other=0.0)
            sums = dot(dg_tile, gate_tile, sums)
            sums = dot(du_tile, up_tile, sums)
        else:
            gate_tile = nf4_tile(
                gate, gate_absmax, levels, channel, c, c < k, tile_n * (BLOCK_N // 64), tl.cdiv(length, 64),
                gate_stride, gate_absmax_stride, BLOCK_N // 64, BLOCK_K, dg.dtype.element_ty
            )  # fmt: skip
            sums = dot(dg_tile, gate_tile, sums)
            up_tile = nf4_tile(
                up, up_absmax, levels, channel, c, c < k, tile_n * (BLOCK_N // 64), tl.cdiv(length, 64),
                up_stride, up_absmax_stride, BLOCK_N // 64, BLOCK_K, dg.dtype.element_ty
            )  # fmt: skip
            sums = dot(du_tile, up_tile, sums)
    zero = (accumulate >> 1) * 16
    place, inside = places(out, rows, channels, m + zero, j + zero, n, length, out_stride, has_rows, False)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


def _pair(
    gate: Matrix, up: Matrix, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, int]:
    """Data and absmax of gate and of up, levels, and values per row.

    Raises:
        ValueError: one is NF4 and the other is not, or they differ in size.
    """
    gate_data, gate_absmax, levels, length = unpack(gate, x)
    up_data, up_absmax, _, up_length = unpack(up, x)
    if isinstance(gate, NF4Matrix) != isinstance(up, NF4Matrix):
        raise ValueError("gate and up are stored alike: both plain or both NF4")
    if (gate_data.shape, length) != (up_data.shape, up_length):
        raise ValueError(f"gate is {gate_data.shape[0]} x {length}, up is {up_data.shape[0]} x {up_length}")
    return gate_data, gate_absmax, up_data, up_absmax, levels, length


def _known(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: one of {', '.join(ACTIVATIONS)}")


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
        x: (T, H) bf16, fp16 or fp32.
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
    _known(activation)
    x = unit_stride(x)
    gate_low, gate_b, gate_rank = factors(gate_low, gate_b, x)
    up_low, up_b, up_rank = factors(up_low, up_b, x)
    gate_data, gate_absmax, up_data, up_absmax, levels, length = _pair(gate, up, x)
    n, k = count_of(rows, x.shape[0]), count_of(channels, gate_data.shape[0])
    g, u, h = x.new_empty(n, k), x.new_empty(n, k), x.new_empty(n, k)
    if not (n and k):
        return g, u, h
    tile = choose(FORWARD_TILES[kind_of(x.dtype, nf4=levels is not None, ragged=k % 16 > 0)], n, k, x.device)
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


def gated_backward(dh: Tensor, g: Tensor, u: Tensor, activation: str = "silu") -> tuple[Tensor, Tensor]:
    """``(dh · u · act'(g), dh · act(g))`` of three tensors of one shape and dtype, in fp32 and rounded once.

    Raises:
        ValueError: an unknown activation.
    """
    _known(activation)
    dh, g, u = dh.contiguous(), g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(u)
    if size := g.numel():
        with torch.cuda.device_of(g):
            gated_backward_kernel[(triton.cdiv(size, BLOCK),)](dh, g, u, dg, du, size, activation, BLOCK, num_warps=4)
    return dg, du


def gated_input_gradient(
    dg: Tensor,
    du: Tensor,
    gate: Matrix,
    up: Matrix,
    rows: Tensor | None,
    channels: Tensor | None,
    out: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """``out[rows] (+)= dg · gate[channels] + du · up[channels]``; other rows of ``out`` stay as they are.

    Args:
        dg, du: (n, k) compact, bf16, fp16 or fp32.
        gate, up: (C, H) in ``dg.dtype``, or both NF4.
        rows: (n,) int64, each at most once; ``None`` for all T.
        channels: (k,) int64; ``None`` for all C.
        out: (T, H) in ``dg.dtype``.
        accumulate: add to ``out``; in fp32, rounded once.

    Returns:
        ``out``.

    Raises:
        ValueError: dtypes that differ, NF4 beside plain, rows of ``out`` not contiguous.
    """
    check_rows(out)
    dg, du = unit_stride(dg), unit_stride(du)
    gate_data, gate_absmax, up_data, up_absmax, levels, length = _pair(gate, up, dg)
    n, k = count_of(rows, out.shape[0]), count_of(channels, gate_data.shape[0])
    if not (n and length):
        return out
    tile = choose(GRADIENT_TILES[kind_of(dg.dtype, nf4=levels is not None, ragged=k % 16 > 0)], n, length, dg.device)
    absent = dg.new_empty(1, dtype=torch.int64)
    with torch.cuda.device_of(dg):
        gated_input_gradient_kernel[(triton.cdiv(n, tile.m) * triton.cdiv(length, tile.n),)](
            dg, du, gate_data, gate_absmax, up_data, up_absmax, levels,
            absent if rows is None else rows, absent if channels is None else channels, out,
            length, k, dg.stride(0), du.stride(0), gate_data.stride(0), up_data.stride(0), stride_of(gate_absmax),
            stride_of(up_absmax), out.stride(0),
            n, int(rows is not None), int(channels is not None), int(accumulate),
            tile.m, tile.n, tile.k, GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """Every tile, in bf16 and fp32, and with every activation where there is one."""
    for kind, tiles in FORWARD_TILES.items():
        for tile in tiles:
            absent = () if "nf4" in kind else ("gate_absmax", "up_absmax", "levels")
            for activation in ACTIVATIONS:
                constants = constants_of(tile, absent) | {"ACTIVATION": activation, "RANK_STEP": RANK_STEP}
                unaligned = _FORWARD_FREE + (("k", "out_stride") if "ragged" in kind else ())
                yield variant(gated_forward_kernel, f"{kind} {activation}", tile, constants, unaligned)
    for kind, tiles in GRADIENT_TILES.items():
        for tile in tiles:
            absent = () if "nf4" in kind else ("gate_absmax", "up_absmax", "levels")
            unaligned = _GRADIENT_FREE + (("k", "dg_stride", "du_stride") if "ragged" in kind else ())
            yield variant(gated_input_gradient_kernel, kind, tile, constants_of(tile, absent), unaligned)
    for dtype in (torch.bfloat16, torch.float32):
        for activation in ACTIVATIONS:
            name = TYPE_NAMES[dtype]
            yield Variant(
                kernel=gated_backward_kernel,
                label=f"gated_backward {activation} {name}",
                signature=dict.fromkeys(("dh", "g", "u", "dg", "out"), f"*{name}") | {"size": "i32"},
                constants={"ACTIVATION": activation, "BLOCK": BLOCK},
                aligned=("dh", "g", "u", "dg", "out"),
            )
