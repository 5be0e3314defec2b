"""Products of chosen tokens with chosen channels of a stored matrix; what the registered operations are made of.

    indexed_nt    Y = X[rows] · W[channels]ᵀ + b[channels]      W: (C, in)     X: (T, in)                      Y: (n, k)
    indexed_nn    Y[rows] = H · W[channels] + b + low · Bᵀ      W: (C, out)    H: (n, k), or (T, C) by index   Y: (T, out)

The channel is dim 0 of the stored matrix in both, so that each is the other's input gradient and a gather is a gather
of contiguous rows. These have no autograd of their own. Operands: :mod:`sparselora_kernels.operands`.

On a CPU the chosen rows are copied and multiplied by the vendor's GEMM. A GPU has the choice between that and a Triton
kernel that reads rows by index (:mod:`sparselora_kernels.gpu.indexed_linear`); :func:`prefers_vendor` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backend import use_triton
from .nf4 import levels, row_absmax
from .operands import NNOperands, NTOperands
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


def _triton_choice(x: Tensor, weight: EncodedWeight, tokens: Tensor, channels: Tensor | None) -> Matrix | None:
    """The matrix for the product's Triton kernel; ``None`` where the vendor's GEMM is used, by rule or for want of one.
    ``tokens`` is anything with a row a token of the product."""
    if not use_triton(x):  # The rule below costs host time.
        return None
    k = weight.channels if channels is None else channels.shape[0]
    if prefers_vendor(tokens.shape[0], k, weight.length, x.dtype, nf4=not weight.plain):
        return None
    return triton_matrix(weight, channels, x)


def indexed_nt(operands: NTOperands, weight: EncodedWeight) -> Tensor:
    """The product of :class:`NTOperands` with ``weight`` (C, in): (n, k) in ``x.dtype``, or ``out``."""
    x, rows, channels, *_ = operands
    matrix = _triton_choice(x, weight, x if rows is None else rows, channels)
    if matrix is None:
        return vendor_nt(operands, weight)
    from .gpu.indexed_linear import indexed_nt as triton_nt

    return triton_nt(operands, matrix)


def vendor_nt(operands: NTOperands, weight: EncodedWeight) -> Tensor:
    """:func:`indexed_nt` by copied rows and the vendor's GEMM; ``out`` needs both lists, ``accumulate`` rounds twice."""
    x, rows, channels, bias, out, accumulate = operands
    if bias is not None and channels is not None:
        bias = bias.index_select(0, channels)
    y = linear(pick(x, rows), weight.decode(channels, x.dtype), bias)
    if out is None:
        return y
    assert rows is not None and channels is not None
    at_rows = out.index_select(0, rows)
    at_rows = at_rows.index_add_(1, channels, y) if accumulate else at_rows.index_copy_(1, channels, y)
    return out.index_copy_(0, rows, at_rows)


def indexed_nn(operands: NNOperands, weight: EncodedWeight) -> Tensor:
    """The product of :class:`NNOperands` with ``weight`` (C, out), into ``out``, which is returned."""
    h, rows, channels, out, *_ = operands
    matrix = _triton_choice(h, weight, out if rows is None else rows, channels)
    if matrix is None:
        return vendor_nn(operands, weight)
    from .gpu.indexed_linear import indexed_nn as triton_nn

    return triton_nn(operands, matrix)


def vendor_nn(operands: NNOperands, weight: EncodedWeight) -> Tensor:
    """:func:`indexed_nn` by copied rows and the vendor's GEMM; needs ``rows``, rounds after each product."""
    h, rows, channels, out, indexed, bias, low, b, accumulate = operands
    assert rows is not None
    if indexed:
        h = h.index_select(0, rows)
        h = h if channels is None else h.index_select(1, channels)
    y = matmul(h, weight.decode(channels, h.dtype), bias)
    add_update(y, low, b)
    return out.index_add_(0, rows, y) if accumulate else out.index_copy_(0, rows, y)
