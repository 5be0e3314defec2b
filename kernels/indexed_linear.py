"""Products of chosen tokens with chosen channels of a stored matrix; what the registered operations are made of.

    indexed_nt    Y = X[rows] · W[channels]ᵀ + b[channels]      W: (C, in)     X: (T, in)                      Y: (n, k)
    indexed_nn    Y[rows] = H · W[channels] + b + low · Bᵀ      W: (C, out)    H: (n, k), or (T, C) by index   Y: (T, out)

The channel is dim 0 of the stored matrix in both, so that each is the other's input gradient and a gather is a gather
of contiguous rows. These have no autograd of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton
from .stored import EncodedWeight


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
    if use_triton(x):
        from .gpu import indexed_linear as gpu

        return gpu.nt(x, weight, rows, channels, bias=bias, out=out, accumulate=accumulate)
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
    if use_triton(h):
        from .gpu import indexed_linear as gpu

        return gpu.nn(h, weight, rows, channels, out, indexed=indexed, bias=bias, low=low, b=b, accumulate=accumulate)
    if indexed:
        h = h.index_select(0, rows)
        h = h if channels is None else h.index_select(1, channels)
    y = matmul(h, weight.decode(channels, h.dtype), bias)
    add_update(y, low, b)
    return out.index_add_(0, rows, y) if accumulate else out.index_copy_(0, rows, y)
