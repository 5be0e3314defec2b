"""The last product of a sparse FFN, put where the tokens are.

    Y = H·W + b + low·Bᵀ     W: (I, H), down stored transposed     (T, H), zero for other tokens

Dense tokens take all neurons, context tokens the rows ``channels``, as in :mod:`sparselora_kernels.gated_ffn`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .indexed_linear import add_update, indexed_nn, indexed_nt, product_nn, product_nt
from .operands import NNOperands, NTOperands
from .operator import held, hold, register, register_with_gradient
from .stored import Weight, refuse_trainable, unpack, weight_of


def forward(
    h_dense: Tensor,
    h_context: Tensor,
    parts: list[Tensor],
    layout: list[int],
    bias: Tensor | None,
    low_dense: Tensor | None,
    low_context: Tensor | None,
    b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    tokens: int,
) -> Tensor:
    some_dense = dense_rows.numel() > 0
    weight = weight_of(parts, layout).once(some_dense, h_context.dtype)
    covered = dense_rows.numel() + context_rows.numel()
    y = (h_context.new_empty if covered == tokens else h_context.new_zeros)(tokens, weight.length)
    if some_dense:
        y.index_copy_(0, dense_rows, add_update(product_nn(h_dense, weight, bias=bias), low_dense, b))
    return indexed_nn(NNOperands(h_context, context_rows, channels, y, bias=bias, low=low_context, b=b), weight)


def _forward_fake(h_dense: Tensor, h_context: Tensor, parts: list[Tensor], layout: list[int], *rest: Any) -> Tensor:
    tokens: int = rest[-1]
    return h_context.new_empty(tokens, weight_of(parts, layout).length)


def backward(
    grad: Tensor,
    parts: list[Tensor],
    layout: list[int],
    low_dense: Tensor | None,
    low_context: Tensor | None,
    b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``h_dense``, ``h_context``, ``low_dense``, ``low_context``, ``b``; the last three may be empty."""
    some_dense = dense_rows.numel() > 0
    weight = weight_of(parts, layout).once(some_dense, grad.dtype)
    dense = grad.index_select(0, dense_rows)
    wide = product_nt(dense, weight) if some_dense else grad.new_empty(0, weight.channels)
    kept = indexed_nt(NTOperands(grad, context_rows, channels), weight)
    if b is None or low_dense is None or low_context is None:
        return wide, kept, grad.new_empty(0), grad.new_empty(0), grad.new_empty(0)
    context = grad.index_select(0, context_rows)
    grad_b = (dense.t() @ low_dense).addmm_(context.t(), low_context)
    return wide, kept, dense @ b, context @ b, grad_b


def _backward_fake(grad: Tensor, parts: list[Tensor], layout: list[int], *rest: Any) -> tuple[Tensor, ...]:
    low_dense, low_context, b, dense_rows, context_rows, channels = rest
    like = (grad.new_empty(0) if t is None else torch.empty_like(t) for t in (low_dense, low_context, b))
    wide = grad.new_empty(dense_rows.shape[0], parts[0].shape[0])
    return wide, grad.new_empty(context_rows.shape[0], channels.shape[0]), *like


_run_backward = register("ffn_down_backward", backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    # Without an update nothing is saved, so that checkpointing does not run this product again.
    ctx.save_for_backward(*inputs[5:8])
    hold(ctx, "parts", inputs[2])
    hold(ctx, "rows", inputs[8:11])
    ctx.layout = inputs[3]


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    lows, parts = ctx.saved_tensors, held(ctx, "parts")
    grads = _run_backward(grad.contiguous(), parts, ctx.layout, *lows, *held(ctx, "rows"))
    updates = [None if low is None else g for low, g in zip(lows, grads[2:])]
    return *grads[:2], [None] * len(parts), None, None, *updates, None, None, None, None


_run = register_with_gradient("ffn_down", forward, _forward_fake, keep=_keep, gradients=_gradients)


def ffn_down(
    h_dense: Tensor,
    h_context: Tensor,
    weight: Weight,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    tokens: int,
    *,
    bias: Tensor | None = None,
    low_dense: Tensor | None = None,
    low_context: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """The product with down, put where the tokens are; exact gradients for ``h`` and the low-rank update.

    Args:
        h_dense, h_context: (D, I) and (n, k), as :func:`gated_up` gives them.
        weight: (I, H), down transposed; frozen.
        dense_rows, context_rows, channels: as in :func:`gated_up`.
        tokens: T, the rows of the result.
        bias: (H,), frozen.
        low_dense, low_context, b: (D, R), (n, R), scaled, and (H, R); all or none.

    Returns:
        (T, H), zero at rows in neither list.

    Raises:
        ValueError: a weight or a bias is trainable, or a part of the low-rank update is missing.
    """
    stored = unpack(weight)
    refuse_trainable("ffn_down", stored, bias)
    if len({low_dense is None, low_context is None, b is None}) > 1:
        raise ValueError("ffn_down takes all of low_dense, low_context and b or none")
    return _run(
        h_dense,
        h_context,
        list(stored.parts),
        list(stored.layout),
        bias,
        low_dense,
        low_context,
        b,
        dense_rows,
        context_rows,
        channels,
        tokens,
    )
