"""Channel scores in Triton; formula and shapes in :mod:`sparselora_kernels.score`.

    p = X Aᵀ                                    (T, n·r), torch's product: one read of X for all factors
    partial[c, j] = Σ_(t in chunk c) (...)²      (chunks, out), one program per chunk and block of channels
    s_j = Σ_c partial[c, j]                      a fixed order, no atomics: repeated runs agree to the bit

A program holds a tokens × channels tile of estimates in registers, adds its squares to a tile of sums, and reduces that
over tokens once at its end; nothing of T × out elements is written. A linear projection is summed in the same way and
not through the r × r Gram matrix, which saves work but subtracts numbers of like size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from .activations import activate
from .tiles import dot
from .variants import TYPE_NAMES, Variant

Factors = tuple[Tensor, Tensor]
"""``A`` (r, in) and ``B`` (out, r)."""

LINEAR = "linear"
"""In the place of an activation: no gate, one pair of factors."""

# (tokens, channels, warps) of a tile by operand type. Three fp32 tiles stay in registers, 16 a thread each; products of
# fp32, outside the matrix units, keep their operands there too.
TILES = {torch.bfloat16: (64, 64, 8), torch.float16: (64, 64, 8), torch.float32: (32, 64, 8)}
# The depth of one matrix instruction, and twice the default rank; larger ranks take several steps.
BLOCK_R = 16
NUM_STAGES = 1
# Tokens per program. 224 channel blocks of an 8B FFN fill a GPU at one chunk; more chunks only shorten the tail.
CHUNK = 512


@triton.jit(do_not_specialize=["p_stride", "rank", "count", "channels", "out_stride"])
def score_kernel(
    p,  # (T, p_stride): the gate's r columns, then those of up
    rows,  # (count,) int64
    gate_b,  # (channels, rank)
    up_b,  # (channels, rank), not read where ACTIVATION is "linear"
    out,  # (chunks, out_stride) fp32
    p_stride,
    rank,
    count,
    channels,
    out_stride,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    chunk = tl.program_id(1)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, count), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        row = tl.load(rows + t, mask=t < count, other=0)
        gate = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        up = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        for k in range(0, rank, BLOCK_R):
            p_at = p + row[:, None] * p_stride + (k + r)[None, :]
            b_at = j[None, :] * rank + (k + r)[:, None]
            p_mask = (t < count)[:, None] & (k + r < rank)[None, :]
            b_mask = (j < channels)[None, :] & (k + r < rank)[:, None]
            low = tl.load(p_at, mask=p_mask, other=0.0)  # (BLOCK_T, BLOCK_R)
            factor = tl.load(gate_b + b_at, mask=b_mask, other=0.0)  # (BLOCK_R, BLOCK_J)
            gate = dot(low, factor, gate)
            if ACTIVATION != "linear":
                low = tl.load(p_at + rank, mask=p_mask, other=0.0)
                factor = tl.load(up_b + b_at, mask=b_mask, other=0.0)
                up = dot(low, factor, up)
        hidden = gate
        if ACTIVATION != "linear":
            hidden = activate(gate, ACTIVATION) * up
        sums += hidden * hidden
    tl.store(out + chunk * out_stride + j, tl.sum(sums, 0), mask=j < channels)


def _configuration(dtype: torch.dtype, activation: str) -> tuple[dict[str, Any], int]:
    """Constexpr parameters and warps."""
    tokens, channels, warps = TILES[dtype]
    sizes = {"CHUNK": CHUNK, "BLOCK_T": tokens, "BLOCK_J": channels, "BLOCK_R": BLOCK_R}
    return {"ACTIVATION": activation, **sizes}, warps


def variants() -> Iterator[Variant]:
    """Every activation in every dtype."""
    sizes = ("p_stride", "rank", "count", "channels", "out_stride")
    for activation in (LINEAR, *ACTIVATIONS):
        for dtype in TILES:
            constants, warps = _configuration(dtype, activation)
            name = TYPE_NAMES[dtype]
            yield Variant(
                kernel=score_kernel,
                label=f"score {activation} {name}",
                signature={"p": f"*{name}", "rows": "*i64", "gate_b": f"*{name}", "up_b": f"*{name}", "out": "*fp32"}
                | dict.fromkeys(sizes, "i32"),
                constants=constants,
                num_warps=warps,
                num_stages=NUM_STAGES,
                matrix_units=dtype != torch.float32,
                aligned=("p", "rows", "gate_b", "up_b", "out"),
            )


def _sum(p: Tensor, first: int, rows: Tensor, gate_b: Tensor, up_b: Tensor, activation: str, out: Tensor) -> None:
    """Fill ``out`` (chunks, channels) from the columns of ``p`` from ``first`` on."""
    channels, rank = gate_b.shape
    if p.dtype not in TILES or not p.dtype == gate_b.dtype == up_b.dtype:
        p, gate_b, up_b = p.float(), gate_b.float(), up_b.float()
    constants, warps = _configuration(p.dtype, activation)
    score_kernel[triton.cdiv(channels, constants["BLOCK_J"]), out.shape[0]](
        p[:, first:], rows, gate_b.contiguous(), up_b.contiguous(), out,
        p.stride(0), rank, rows.shape[0], channels, out.stride(0),
        **constants, num_warps=warps, num_stages=NUM_STAGES,
    )  # fmt: skip


def gated_ffn_score(x: Tensor, rows: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """See :func:`sparselora_kernels.gated_ffn_score`; ``activation`` is one of ``ACTIVATIONS``."""
    p = torch.nn.functional.linear(x, torch.cat([gate[0], up[0]]).to(x.dtype))
    partials = x.new_empty((_chunks(rows), gate[1].shape[0]), dtype=torch.float32)
    if partials.numel():
        _sum(p, 0, rows, gate[1], up[1], activation, partials)
    return partials.sum(0)


def projection_scores(x: Tensor, rows: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Scores of several projections of one ``x``, one after another: (Σ out,) fp32.

    Args:
        x: (T, in).
        rows: int64 rows of ``x`` to sum over.
        a: (r_i, in) each; b: (out_i, r_i) each.
    """
    p = torch.nn.functional.linear(x, torch.cat(list(a)).to(x.dtype))
    widths = [factor.shape[0] for factor in b]
    partials = x.new_empty((_chunks(rows), sum(widths)), dtype=torch.float32)
    first = 0
    for factor, out in zip(b, partials.split(widths, 1)):
        if out.numel():
            _sum(p, first, rows, factor, factor, LINEAR, out)
        first += factor.shape[1]
    return partials.sum(0)


def _chunks(rows: Tensor) -> int:
    return triton.cdiv(rows.shape[0], CHUNK)
