"""Products with chosen rows of a weight matrix.

Two forms, both with the channel as dim 0 of the stored weight, so that a gather is a gather of contiguous rows:

    transposed=False    Y = X · W[channels]ᵀ + b[channels]     W: (C, in)    X: (T, in)           Y: (T, k)
    transposed=True     Y = H · W[channels]  + b               W: (C, out)   H: (T, k)            Y: (T, out)

What autograd keeps is the weight tensor itself and the channel indices, never the gathered rows: under ZeRO-3 and
FSDP2 the tensor is sharded between forward and backward and gathered again, and a kept copy would undo that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .rows import blank


def _gather(weight: Tensor, channels: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = weight if channels is None else weight.index_select(0, channels)
    return rows.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, channels: Tensor | None, transposed: bool) -> Tensor:
    """The product itself, shared by both operations. ``x`` (T, k or in) -> (T, out or k)."""
    rows = _gather(weight, channels, x.dtype)
    if not transposed:
        kept_bias = None if bias is None else _gather(bias, channels, x.dtype)
        return torch.nn.functional.linear(x, rows, kept_bias)
    return x @ rows if bias is None else torch.addmm(bias.to(x.dtype), x, rows)


def _input_gradient(grad: Tensor, weight: Tensor, channels: Tensor | None, transposed: bool) -> Tensor:
    rows = _gather(weight, channels, grad.dtype)
    return grad @ rows.t() if transposed else grad @ rows


class _IndexedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, channels: Tensor | None, transposed: bool
    ) -> Tensor:
        # The input is needed for the weight's gradient only: frozen weights keep no activation.
        ctx.save_for_backward(weight, channels, x if weight.requires_grad else None)
        ctx.transposed = transposed
        return _product(x, weight, bias, channels, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, channels, x = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, weight, channels, ctx.transposed)
        if ctx.needs_input_grad[1]:
            rows = x.t() @ grad if ctx.transposed else grad.t() @ x
            rows = rows.to(weight.dtype)
            grad_weight = rows if channels is None else torch.zeros_like(weight).index_copy_(0, channels, rows)
        return grad_x, grad_weight, None, None, None


def indexed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    channels: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """``x · weight[channels]ᵀ`` or, transposed, ``x · weight[channels]``; exact gradients for ``x`` and ``weight``.

    Args:
        x: (T, in), or (T, k) when transposed; any T, zero included.
        weight: (C, in), or (C, out) when transposed. Frozen or trainable. Cast to ``x.dtype`` row by row.
        bias: (C,) for the plain form (kept channels keep theirs), (out,) for the transposed one. Frozen.
        channels: (k,) sorted int64 rows of ``weight``; ``None`` means all of them.

    Returns:
        (T, k), or (T, out) when transposed, in ``x.dtype``.

    Raises:
        ValueError: ``bias`` is trainable.
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("indexed_linear computes no bias gradient: freeze the bias")
    return _IndexedLinear.apply(x, weight, bias, channels, transposed)


class _IndexedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dense_rows: Tensor,
        context_rows: Tensor,
        channels: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, dense_rows, context_rows, channels)
        ctx.transposed = transposed
        ctx.input_shape = x.shape
        out_features = weight.shape[1 if transposed else 0]
        covered = dense_rows.numel() + context_rows.numel()
        y = blank(x, x.shape[0], out_features, covered)
        y.index_copy_(0, dense_rows, _product(x.index_select(0, dense_rows), weight, bias, None, transposed))
        x_context = x.index_select(0, context_rows)
        if transposed:
            x_context = x_context.index_select(1, channels)
        kept = _product(x_context, weight, bias, channels, transposed)
        if not transposed:
            kept = kept.new_zeros(kept.shape[0], out_features).index_copy_(1, channels, kept)
        return y.index_copy_(0, context_rows, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, dense_rows, context_rows, channels = ctx.saved_tensors
        tokens, width = ctx.input_shape
        grad_x = blank(grad, tokens, width, dense_rows.numel() + context_rows.numel())
        dense = _input_gradient(grad.index_select(0, dense_rows), weight, None, ctx.transposed)
        grad_x.index_copy_(0, dense_rows, dense)
        context = grad.index_select(0, context_rows)
        if not ctx.transposed:
            context = context.index_select(1, channels)
        context = _input_gradient(context, weight, channels, ctx.transposed)
        if ctx.transposed:
            context = context.new_zeros(context.shape[0], grad_x.shape[1]).index_copy_(1, channels, context)
        grad_x.index_copy_(0, context_rows, context)
        return grad_x, None, None, None, None, None, None


def indexed_projection(
    x: Tensor,
    weight: Tensor,
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
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("indexed_projection computes no weight gradient: freeze the weight and the bias")
    return _IndexedProjection.apply(x, weight, bias, dense_rows, context_rows, channels, transposed)
