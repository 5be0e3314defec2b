"""Products of chosen tokens with chosen channels of a stored matrix; what the registered operations are made of.

    indexed_nt    Y = X[rows] · W[channels]ᵀ + b[channels]      W: (C, in)     X: (T, in)                      Y: (n, k)
    indexed_nn    Y[rows] = H · W[channels] + b + low · Bᵀ      W: (C, out)    H: (n, k)                      Y: (T, out)

The channel is dim 0 of the stored matrix in both, so that each is the other's input gradient and a gather is a gather
of contiguous rows. These have no autograd of their own. Operands: :mod:`sparselora_kernels.operands`.

On a CPU the chosen rows are copied and multiplied by the vendor's GEMM. A GPU has the choice between that and a Triton
kernel that reads rows by index (:mod:`sparselora_kernels.gpu.indexed_linear`); :mod:`.choice` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import fp8
from .backend import use_triton
from .choice import prefers_vendor
from .nf4 import levels, row_absmax
from .operands import NNOperands, NTOperands
from .rates import rates_of
from .stored import EncodedWeight

if TYPE_CHECKING:
    from .gpu.matrix import Matrix


def linear(x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x · rowsᵀ + bias``, the bias in the dtype of ``x``."""
    return torch.nn.functional.linear(x, rows, None if bias is None else bias.to(x.dtype))


def matmul(h: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h · rows + bias``, the bias in the dtype of ``h``."""
    return h @ rows if bias is None else torch.addmm(bias.to(h.dtype), h, rows)


def product_nt(x: Tensor, weight: EncodedWeight, channels: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``x · weight[channels]ᵀ + bias[channels]``: (n, in) -> (n, k), by the vendor's GEMM in ``x.dtype``, or in fp8."""
    if bias is not None and channels is not None:
        bias = bias.index_select(0, channels)
    if weight.multiplies(x.dtype):
        return fp8.product_nt(x, weight, channels, bias)
    return linear(x, weight.decode(channels, x.dtype), bias)


def product_nn(
    h: Tensor,
    weight: EncodedWeight,
    channels: Tensor | None = None,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """``h · weight[channels] + bias``: (n, k) -> (n, out), likewise; added to ``onto``, in place, where that is given."""
    if weight.multiplies(h.dtype):
        y = fp8.product_nn(h, weight, channels, bias)
        return y if onto is None else onto.add_(y)
    rows = weight.decode(channels, h.dtype)
    return matmul(h, rows, bias) if onto is None else onto.addmm_(h, rows)


def add_update(y: Tensor, low: Tensor | None, b: Tensor | None) -> Tensor:
    """``y + low · bᵀ``, in place; ``y`` where there is no update."""
    return y if low is None or b is None else y.addmm_(low, b.t())


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """``x[rows]``, or all of it."""
    return x if rows is None else x.index_select(0, rows)


def triton_matrix(weight: EncodedWeight, channels: Tensor | None, x: Tensor) -> Matrix | None:
    """The matrix as the Triton kernels read it; ``None`` where they do not: on a CPU, in fp16 and fp64, cast from another
    dtype. They are compiled in bf16 and fp32 only; fp16 is left to the vendor's products."""
    if not use_triton(x) or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    if weight.plain:
        return weight.parts[0] if weight.parts[0].dtype == x.dtype else None
    if not weight.nf4:
        return None
    from .gpu.matrix import NF4Matrix

    codes, scales = weight.parts
    _, length, double_quant = weight.layout
    absmax = row_absmax(scales, channels, length, bool(double_quant), weight.first)
    return NF4Matrix(codes, absmax, levels(codes.device), length)


@lru_cache(4096)  # Layers ask for the same again and again.
def takes_vendor(
    product: str, n: int, k: int, length: int, dtype: torch.dtype, device: torch.device, *, nf4: bool, **options: bool
) -> bool:
    """:func:`~sparselora_kernels.choice.prefers_vendor` by the rates of a device and the launchers' tiles."""
    from .gpu.estimate import product_seconds

    compute = product_seconds(product, n, k, length, dtype, nf4=nf4, device=device) if n and k else 0.0
    return prefers_vendor(product, n, k, length, dtype, nf4=nf4, compute=compute, rates=rates_of(device), **options)


def triton_choice(
    product: str, x: Tensor, matrices: Sequence[EncodedWeight], tokens: int, channels: Tensor | None, **options: bool
) -> list[Matrix] | None:
    """The matrices for the product's Triton kernel; ``None`` where the vendor's GEMM is used, by rule or for want of one.
    ``options`` are those of :func:`~sparselora_kernels.choice.prefers_vendor`."""
    if not use_triton(x):  # The rule below costs host time.
        return None
    first = matrices[0]
    k = first.channels if channels is None else channels.shape[0]
    if not (first.plain or first.nf4):  # Decoded rows are a copy already.
        return None
    if takes_vendor(product, tokens, k, first.length, x.dtype, x.device, nf4=first.nf4, **options):
        return None
    found = [matrix for weight in matrices if (matrix := triton_matrix(weight, channels, x)) is not None]
    return found if len(found) == len(matrices) and len({weight.plain for weight in matrices}) == 1 else None


def indexed_nt(operands: NTOperands, weight: EncodedWeight) -> Tensor:
    """The product of :class:`NTOperands` with ``weight`` (C, in): (n, k) in ``x.dtype``."""
    x, rows, channels, _ = operands
    tokens = (x if rows is None else rows).shape[0]
    matrices = triton_choice("nt", x, [weight], tokens, channels, copies_rows=rows is not None)
    if matrices is None:
        return vendor_nt(operands, weight)
    from .gpu.indexed_linear import indexed_nt as triton_nt

    return triton_nt(operands, matrices[0])


def vendor_nt(operands: NTOperands, weight: EncodedWeight) -> Tensor:
    """:func:`indexed_nt` by copied rows and the vendor's GEMM."""
    x, rows, channels, bias = operands
    return product_nt(pick(x, rows), weight, channels, bias)


def indexed_nn(operands: NNOperands, weight: EncodedWeight) -> Tensor:
    """The product of :class:`NNOperands` with ``weight`` (C, out), into ``out``, which is returned."""
    h, rows, channels, out, *_ = operands
    tokens = (out if rows is None else rows).shape[0]
    matrices = triton_choice("nn", h, [weight], tokens, channels, updates=operands.low is not None)
    if matrices is None:
        return vendor_nn(operands, weight)
    from .gpu.indexed_linear import indexed_nn as triton_nn

    return triton_nn(operands, matrices[0])


def vendor_nn(operands: NNOperands, weight: EncodedWeight) -> Tensor:
    """:func:`indexed_nn` by copied rows and the vendor's GEMM; needs ``rows``, rounds after each product."""
    h, rows, channels, out, bias, low, b, accumulate = operands
    assert rows is not None
    y = product_nn(h, weight, channels, bias)
    add_update(y, low, b)
    return out.index_add_(0, rows, y) if accumulate else out.index_copy_(0, rows, y)
