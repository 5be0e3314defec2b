"""Gate times up element by element, and the gradients of :mod:`.gated_ffn`: of gate and up, and of the input.

gated_product           h = act(g) · u
gated_backward          dg = dh · u · act'(g),  du = dh · act(g)
gated_input_gradient    out[rows] (+)= dg · Wg[channels] + du · Wu[channels]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS, check_activation
from .activations import activate, activate_gradient
from .indexing import index_at, nf4_tile, places, tile_of
from .matrix import Matrix, check_rows, count_of, stride_of, unit_stride, unpack_pair
from .tiles import dot, rounded
from .tiling import GROUP, Tile, choose, constants_of, kind_of, variant
from .variants import TYPE_NAMES, Variant

# As in indexed_linear.py.
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

_GRADIENT_FREE = ("n", "has_rows", "has_channels", "accumulate")


@triton.jit(do_not_specialize=["size"])
def gated_product_kernel(g, u, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(g + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, rounded(activate(gate, ACTIVATION) * up, out.dtype.element_ty), mask=inside)


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
    # What is added first and the zero: see nn_kernel.
    place, inside = places(out, rows, m, j, n * accumulate, length, out_stride, has_rows)
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
    place, inside = places(out, rows, m + zero, j + zero, n, length, out_stride, has_rows)
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


def gated_product(g: Tensor, u: Tensor, activation: str = "silu") -> Tensor:
    """``act(g) · u`` of two tensors of one shape and dtype, in fp32 and rounded once.

    Raises:
        ValueError: an unknown activation.
    """
    check_activation(activation)
    g, u = g.contiguous(), u.contiguous()
    h = torch.empty_like(g)
    if size := g.numel():
        with torch.cuda.device_of(g):
            gated_product_kernel[(triton.cdiv(size, BLOCK),)](g, u, h, size, activation, BLOCK, num_warps=4)
    return h


def gated_backward(dh: Tensor, g: Tensor, u: Tensor, activation: str = "silu") -> tuple[Tensor, Tensor]:
    """``(dh · u · act'(g), dh · act(g))`` of three tensors of one shape and dtype, in fp32 and rounded once.

    Raises:
        ValueError: an unknown activation.
    """
    check_activation(activation)
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
        dg, du: (n, k) compact, bf16 or fp32.
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
    gate_data, gate_absmax, up_data, up_absmax, levels, length = unpack_pair(gate, up, dg)
    n, k = count_of(rows, out.shape[0]), count_of(channels, gate_data.shape[0])
    if not (n and length):
        return out
    kind = kind_of(dg.dtype, nf4=levels is not None, ragged=k % 16 > 0)
    tile = choose(GRADIENT_TILES, kind, "gradient", n, length, dg.device)
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
    """Every tile in bf16 and fp32; every activation in those and in fp16, whose products are the vendor's."""
    for kind, tiles in GRADIENT_TILES.items():
        for tile in tiles:
            absent = () if "nf4" in kind else ("gate_absmax", "up_absmax", "levels")
            unaligned = _GRADIENT_FREE + (("k", "dg_stride", "du_stride") if "ragged" in kind else ())
            yield variant(gated_input_gradient_kernel, kind, tile, constants_of(tile, absent), unaligned)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for activation in ACTIVATIONS:
            name = TYPE_NAMES[dtype]
            yield Variant(
                kernel=gated_backward_kernel,
                label=f"gated_backward {activation} {name}",
                signature=dict.fromkeys(("dh", "g", "u", "dg", "out"), f"*{name}") | {"size": "i32"},
                constants={"ACTIVATION": activation, "BLOCK": BLOCK},
                aligned=("dh", "g", "u", "dg", "out"),
            )
            yield Variant(
                kernel=gated_product_kernel,
                label=f"gated_product {activation} {name}",
                signature=dict.fromkeys(("g", "u", "out"), f"*{name}") | {"size": "i32"},
                constants={"ACTIVATION": activation, "BLOCK": BLOCK},
                aligned=("g", "u", "out"),
            )
