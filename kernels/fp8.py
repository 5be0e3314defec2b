"""Products with an fp8 matrix in fp8 (``torch._scaled_mm``), on GPUs that multiply it: compute capability 8.9 and more.

    nt    Y = X · Wᵀ + b    W = Q ∘ s: (C, in)
    nn    Y = H · W + b     W = Q ∘ s: (C, out)

``X`` or ``H`` is rounded to e4m3fn too, with one scale a token, which is made from that token alone. A scale of ``W`` that
belongs to a column of the result is the product's own second scale. One that lies on the side that is summed over cannot
be taken out of the sum: it goes into the other operand before that is rounded. So an fp8 matrix with a scale per channel,
or one for all of it, multiplies in both directions without being decoded; blocks of 128 by 128 do not.

``_scaled_mm`` reads both operands along the sum. For ``nt`` the matrix lies so; for ``nn`` the kept rows' bytes are
turned, which writes half of what decoding them would. Both sides of the second operand must be multiples of 16, and rows
begin at multiples of 16 bytes: what is not so is copied into zeros. Sums are fp32 (``use_fast_accum`` is off), results
bf16. Computations in other dtypes, and other devices, decode; so do routed experts, adapters on a pruned base, and the
order of a LoRA branch that adds it to the weight first.

Not run on a GPU yet: tests on a CPU put a stand-in for ``_scaled_mm`` in its place that refuses what a GPU would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton
from .floats import FP32, row_scales, to_fp8
from .stored import EncodedWeight

_STEP = 16


def product_nt(x: Tensor, weight: EncodedWeight, channels: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x · weight[channels]ᵀ + bias``, the bias that of the channels: (n, in) -> (n, k), bf16."""
    rows, by_channel, by_column = _picked(weight, channels)
    return _product(*round_rows(x, by_column), operand(rows), by_channel, rows.shape[0], bias)


def product_nn(h: Tensor, weight: EncodedWeight, channels: Tensor | None, bias: Tensor | None) -> Tensor:
    """``h · weight[channels] + bias``: (n, k) -> (n, out), bf16."""
    rows, by_channel, by_column = _picked(weight, channels)
    return _product(*round_rows(h, by_channel), operand(rows.t()), by_column, rows.shape[1], bias)


def _picked(weight: EncodedWeight, channels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes (k, length) of chosen rows, and their scales by channel (k,) or by column (length,), fp32; the other is
    ``None``."""
    codes, scales = weight.parts
    _, _, _, _, block, every, _ = weight.layout
    rows = codes if channels is None else codes.index_select(0, channels)
    found = row_scales(scales, None, channels, rows.shape[0], FP32, every, weight.first).view(-1)
    return (rows, None, found) if block else (rows, found.expand(rows.shape[0]), None)


def round_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` (n, m), times ``factors`` (m,) fp32, in fp8: codes (n, m', the next multiple of 16) uint8, scales (n, 1) fp32.

    A row that is not finite becomes NaN.
    """
    wide = _up(x.shape[1])
    if use_triton(x):
        from .gpu import fp8

        if x.dtype in fp8.DTYPES:
            with torch.cuda.device_of(x):
                return fp8.round_rows(x, factors, wide)
    codes, scales = to_fp8(x.float() if factors is None else x.float() * factors)
    return torch.nn.functional.pad(codes, (0, wide - x.shape[1])), scales


def operand(rows: Tensor) -> Tensor:
    """Codes (N, K) as the product reads them: both sides multiples of 16, one row after another, aligned."""
    n, k = _up(rows.shape[0]), _up(rows.shape[1])
    if (n, k) == rows.shape and rows.is_contiguous() and rows.data_ptr() % _STEP == 0:
        return rows
    if use_triton(rows) and rows.stride(0) == 1:
        from .gpu import fp8

        with torch.cuda.device_of(rows):
            return fp8.turned(rows.t(), n, k)
    padded = rows.new_zeros(n, k)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _up(size: int) -> int:
    return -(-size // _STEP) * _STEP


def _product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor | None, count: int, bias: Tensor | None
) -> Tensor:
    """``left · rightᵀ + bias`` of codes (n, K) and (N, K) with their scales: the first ``count`` columns, bf16."""
    if not left.numel() or not count:  # Nothing is multiplied, which implementations answer in several ways.
        y = left_scales.new_zeros((left.shape[0], count), dtype=torch.bfloat16)
        return y if bias is None else y.add_(bias)
    scales = left_scales.new_ones(1, right.shape[0])
    if right_scales is not None:
        scales[0, :count] = right_scales
    if bias is not None:
        bias = torch.nn.functional.pad(bias.to(torch.bfloat16), (0, right.shape[0] - count))
    y = torch._scaled_mm(
        left.view(torch.float8_e4m3fn),
        right.view(torch.float8_e4m3fn).t(),
        left_scales,
        scales,
        bias=bias,
        out_dtype=torch.bfloat16,
    )
    return y if y.shape[1] == count else y[:, :count].contiguous()
