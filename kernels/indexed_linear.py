"""Products with chosen rows of a weight matrix.

Two forms, both with the channel as dim 0 of the stored weight, so that a gather is a gather of contiguous rows:

    transposed=False    Y = X · W[channels]ᵀ + b[channels]     W: (C, in)    X: (T, in)           Y: (T, k)
    transposed=True     Y = H · W[channels]  + b               W: (C, out)   H: (T, k)            Y: (T, out)

The weight may be encoded (:mod:`sparselora_kernels.stored`); what autograd keeps is its parts and the channel indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .rows import blank
from .stored import Decode, EncodedWeight, Weight, unpack, whole_and_kept


def product(x: Tensor, rows: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x`` (T, in or k) with decoded ``rows`` (k, in or out) -> (T, k or out)."""
    bias = None if bias is None else bias.to(x.dtype)
    if not transposed:
        return torch.nn.functional.linear(x, rows, bias)
    return x @ rows if bias is None else torch.addmm(bias, x, rows)


def input_gradient(grad: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    """Gradient of :func:`product` for ``x``."""
    return grad @ rows.t() if transposed else grad @ rows


def frozen(operation: str, parts: tuple[Tensor, ...], bias: Tensor | None) -> None:
    """Refuse what the operation computes no gradient for."""
    if any(part.requires_grad for part in parts) or (bias is not None and bias.requires_grad):
        raise ValueError(f"{operation} computes no weight gradient: freeze the weight and the bias")


class _IndexedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        channels: Tensor | None,
        transposed: bool,
        decode: Decode,
        *parts: Tensor,
    ) -> Tensor:
        # The input is needed for the weight's gradient only: frozen weights keep no activation.
        trained = parts[0].requires_grad
        ctx.save_for_backward(channels, x if trained else None, *parts)
        ctx.transposed, ctx.decode = transposed, decode
        if bias is not None and channels is not None and not transposed:
            bias = bias.index_select(0, channels)
        return product(x, decode(parts, channels, x.dtype), bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        channels, x, *parts = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad, ctx.decode(tuple(parts), channels, grad.dtype), ctx.transposed)
        if x is not None:
            weight = parts[0]
            rows = x.t() @ grad if ctx.transposed else grad.t() @ x
            rows = rows.to(weight.dtype)
            grad_weight = rows if channels is None else torch.zeros_like(weight).index_copy_(0, channels, rows)
        return grad_x, None, None, None, None, grad_weight, *(None for _ in parts[1:])


def indexed_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    channels: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """``x · weight[channels]ᵀ`` or, transposed, ``x · weight[channels]``; exact gradients for ``x`` and ``weight``.

    Args:
        x: (T, in), or (T, k) when transposed; any T, zero included.
        weight: (C, in), or (C, out) when transposed. A plain one may be trainable. Cast to ``x.dtype`` row by row.
        bias: (C,) for the plain form (kept channels keep theirs), (out,) for the transposed one. Frozen.
        channels: (k,) sorted int64 rows of ``weight``; ``None`` means all of them.

    Returns:
        (T, k), or (T, out) when transposed, in ``x.dtype``.

    Raises:
        ValueError: ``bias`` is trainable.
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("indexed_linear computes no bias gradient: freeze the bias")
    parts, decode = unpack(weight)
    return _IndexedLinear.apply(x, bias, channels, transposed, decode, *parts)


class _IndexedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        dense_rows: Tensor,
        context_rows: Tensor,
        channels: Tensor,
        transposed: bool,
        decode: Decode,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(dense_rows, context_rows, channels, *parts)
        ctx.transposed, ctx.decode = transposed, decode
        ctx.input_shape = x.shape
        whole, kept = whole_and_kept(EncodedWeight(parts, decode), dense_rows.numel() > 0, channels, x.dtype)
        out_features = kept.shape[1] if transposed else parts[0].shape[0]
        y = blank(x, x.shape[0], out_features, dense_rows.numel() + context_rows.numel())
        if dense_rows.numel():
            y.index_copy_(0, dense_rows, product(x.index_select(0, dense_rows), whole, bias, transposed))
        context = x.index_select(0, context_rows)
        if transposed:
            context = product(context.index_select(1, channels), kept, bias, transposed)
        else:
            context = product(context, kept, None if bias is None else bias.index_select(0, channels), transposed)
            context = context.new_zeros(context.shape[0], out_features).index_copy_(1, channels, context)
        return y.index_copy_(0, context_rows, context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        dense_rows, context_rows, channels, *parts = ctx.saved_tensors
        weight = EncodedWeight(tuple(parts), ctx.decode)
        whole, kept = whole_and_kept(weight, dense_rows.numel() > 0, channels, grad.dtype)
        tokens, width = ctx.input_shape
        grad_x = blank(grad, tokens, width, dense_rows.numel() + context_rows.numel())
        if dense_rows.numel():
            grad_x.index_copy_(0, dense_rows, input_gradient(grad.index_select(0, dense_rows), whole, ctx.transposed))
        context = grad.index_select(0, context_rows)
        if ctx.transposed:
            context = input_gradient(context, kept, ctx.transposed)
            context = context.new_zeros(context.shape[0], width).index_copy_(1, channels, context)
        else:
            context = input_gradient(context.index_select(1, channels), kept, ctx.transposed)
        grad_x.index_copy_(0, context_rows, context)
        return grad_x, None, None, None, None, None, None, *(None for _ in parts)


def indexed_projection(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """A frozen projection that is whole for dense tokens and only ``channels`` wide for context tokens.

    Plain form (q, k, v): context rows of the result are ``x · weight[channels]ᵀ + bias[channels]`` at ``channels``
    and zero elsewhere. Transposed form (o): context rows read only ``x[:, channels]``. Rows in neither list (padding)
    are zero, in the result and in the gradient.

    Args:
        x: (T, in).
        weight: (out, in), or (in, out) when transposed: the channel is dim 0. Frozen.
        bias: (out,) or ``None``. Frozen.
        dense_rows, context_rows: disjoint int64 row indices of ``x``.
        channels: (k,) sorted int64 rows of ``weight``.

    Returns:
        (T, out) in ``x.dtype``.

    Raises:
        ValueError: ``weight`` or ``bias`` is trainable.
    """
    parts, decode = unpack(weight)
    frozen("indexed_projection", parts, bias)
    return _IndexedProjection.apply(x, bias, dense_rows, context_rows, channels, transposed, decode, *parts)
