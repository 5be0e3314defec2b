"""Products of chosen tokens with chosen channels of a stored matrix; what the registered operations are made of.

    indexed_nt    Y = X[rows] · W[channels]ᵀ + b[channels]      W: (C, in)     X: (T, in)                      Y: (n, k)
    indexed_nn    Y[rows] = H · W[channels] + b + low · Bᵀ      W: (C, out)    H: (n, k), or (T, C) by index   Y: (T, out)

The channel is dim 0 of the stored matrix in both, so that each is the other's input gradient and a gather is a gather
of contiguous rows. These have no autograd of their own.

On a CPU the chosen rows are copied and multiplied by the vendor's GEMM. A GPU has the choice between that and a Triton
kernel that reads rows by index (:mod:`sparselora_kernels.gpu.indexed_linear`); :func:`prefers_vendor` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backend import use_triton
from .nf4 import levels, row_absmax
from .stored import EncodedWeight

if TYPE_CHECKING:
    from .gpu.matrix import Matrix


def linear(x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x · rowsᵀ + bias``, the bias in the dtype of ``x``."""
    return torch.nn.functional.linear(x, rows, None if bias is None else bias.to(x.dtype))


def matmul(h: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h · rows + bias``, the bias in the dtype of ``h``."""
    return h @ rows if bias is None else torch.addmm(bias.to(h.dtype), h, rows)


def add_update(y: Tensor, low: Tensor | None, b: Tensor | None) -> Tensor:
    """``y + low · bᵀ``, in place; ``y`` where there is no update."""
    return y if low is None or b is None else y.addmm_(low, b.t())


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """``x[rows]``, or all of it."""
    return x if rows is None else x.index_select(0, rows)


def prefers_vendor(n: int, k: int, length: int, dtype: torch.dtype, *, nf4: bool = False) -> bool:
    """Whether to copy rows and multiply with the vendor's GEMM: a rule by arithmetic, **not yet measured**.

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


def triton_matrix(weight: EncodedWeight, channels: Tensor | None, x: Tensor) -> Matrix | None:
    """The matrix as the Triton kernels read it; ``None`` where they do not: on a CPU, in fp16 and fp64, cast from another
    dtype. They are compiled in bf16 and fp32 only; fp16 is left to the vendor's products."""
    if not use_triton(x) or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    if weight.plain:
        return weight.parts[0] if weight.parts[0].dtype == x.dtype else None
    from .gpu.matrix import NF4Matrix

    codes, scales = weight.parts
    length, double_quant = weight.layout
    return NF4Matrix(codes, row_absmax(scales, channels, length, bool(double_quant)), levels(codes.device), length)


def _kept(channels: Tensor | None, weight: EncodedWeight) -> int:
    return weight.channels if channels is None else channels.shape[0]


def indexed_nt(
    x: Tensor,
    weight: EncodedWeight,
    rows: Tensor | None,
    channels: Tensor | None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``x[rows] · weight[channels]ᵀ + bias[channels]``.

    Args:
        x: (T, in).
        weight: (C, in).
        rows: (n,) int64 tokens; ``None`` means all.
        channels: (k,) int64 rows of ``weight``, ascending; ``None`` means all.
        bias: (C,).
        out: (T, C) to write the result into, at ``out[rows, channels]``; needs both lists.
        accumulate: add to what ``out`` holds there.

    Returns:
        (n, k) in ``x.dtype``, or ``out``.
    """
    n = x.shape[0] if rows is None else rows.shape[0]
    if not prefers_vendor(n, _kept(channels, weight), weight.length, x.dtype, nf4=not weight.plain):
        matrix = triton_matrix(weight, channels, x)
        if matrix is not None:
            from .gpu.indexed_linear import indexed_nt as triton_nt

            return triton_nt(x, matrix, rows, channels, bias=bias, out=out, accumulate=accumulate)
    return vendor_nt(x, weight, rows, channels, bias=bias, out=out, accumulate=accumulate)


def vendor_nt(
    x: Tensor,
    weight: EncodedWeight,
    rows: Tensor | None,
    channels: Tensor | None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """:func:`indexed_nt` by copied rows and the vendor's GEMM; ``accumulate`` rounds twice."""
    if bias is not None and channels is not None:
        bias = bias.index_select(0, channels)
    y = linear(pick(x, rows), weight.decode(channels, x.dtype), bias)
    if out is None:
        return y
    assert rows is not None and channels is not None
    at_rows = out.index_select(0, rows)
    at_rows = at_rows.index_add_(1, channels, y) if accumulate else at_rows.index_copy_(1, channels, y)
    return out.index_copy_(0, rows, at_rows)


def indexed_nn(
    h: Tensor,
    weight: EncodedWeight,
    rows: Tensor,
    channels: Tensor | None,
    out: Tensor,
    *,
    indexed: bool = False,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``out[rows] = H · weight[channels] + bias + low · bᵀ``.

    Args:
        h: (n, k); or (T, C) with ``indexed``, and ``h[rows][:, channels]`` is read.
        weight: (C, out).
        rows: (n,) int64 tokens.
        channels: (k,) int64 rows of ``weight``, ascending; ``None`` means all.
        out: (T, out), written at ``rows`` only.
        bias: (out,).
        low, b: (n, R) and (out, R), a low-rank update; both or neither.
        accumulate: add to what ``out`` holds there.

    Returns:
        ``out``.
    """
    if not prefers_vendor(rows.shape[0], _kept(channels, weight), weight.length, h.dtype, nf4=not weight.plain):
        matrix = triton_matrix(weight, channels, h)
        if matrix is not None:
            from .gpu.indexed_linear import indexed_nn as triton_nn

            return triton_nn(
                h, matrix, rows, channels, out, indexed=indexed, bias=bias, low=low, b=b, accumulate=accumulate
            )
    return vendor_nn(h, weight, rows, channels, out, indexed=indexed, bias=bias, low=low, b=b, accumulate=accumulate)


def vendor_nn(
    h: Tensor,
    weight: EncodedWeight,
    rows: Tensor,
    channels: Tensor | None,
    out: Tensor,
    *,
    indexed: bool = False,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """:func:`indexed_nn` by copied rows and the vendor's GEMM; rounds after each product."""
    if indexed:
        h = h.index_select(0, rows)
        h = h if channels is None else h.index_select(1, channels)
    y = matmul(h, weight.decode(channels, h.dtype), bias)
    add_update(y, low, b)
    return out.index_add_(0, rows, y) if accumulate else out.index_copy_(0, rows, y)
