"""The first product of a sparse FFN without a gate, for dense and context tokens at once.

    H = X·Wᵀ + b + low·Bᵀ     (D, I) dense    (n, k) context    one after the other in one tensor

Dense tokens take all neurons, context tokens the rows ``channels`` of the matrix and of the LoRA factor ``B``, as in
:mod:`sparselora_kernels.gated_ffn`. The result has no shape of tokens and neurons, because what comes next, the family's
own activation, is elementwise; :mod:`sparselora_kernels.ffn_down` takes the two parts. Nothing but the low-rank update is
kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .indexed_linear import add_update, indexed_nn, indexed_nt, product_nn, product_nt
from .operands import NNOperands, NTOperands
from .operator import held, hold, is_traced, register, register_with_gradient
from .stored import Weight, refuse_trainable, unpack, weight_of


def forward(
    x: Tensor,
    parts: list[Tensor],
    layout: list[int],
    bias: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
) -> Tensor:
    """Called directly, ``channels`` may be a function that gives them, once the dense tokens are under way."""
    some_dense = dense_rows.numel() > 0
    weight = weight_of(parts, layout).once(some_dense, x.dtype)
    wide = x.new_empty(0)
    if some_dense:
        wide = product_nt(x.index_select(0, dense_rows), weight, bias=bias)
        add_update(wide, None if low is None else low.index_select(0, dense_rows), b)
    channels = _known(channels)
    kept = indexed_nt(NTOperands(x, context_rows, channels, bias), weight)
    if low is not None and b is not None:
        add_update(kept, low.index_select(0, context_rows), b.index_select(0, channels))
    return torch.cat([wide.flatten(), kept.flatten()])


def _forward_fake(x: Tensor, parts: list[Tensor], layout: list[int], *rest: Any) -> Tensor:
    dense_rows, context_rows, channels = rest[-3:]
    width = weight_of(parts, layout).channels
    return x.new_empty(dense_rows.shape[0] * width + context_rows.shape[0] * channels.shape[0])


def _known(channels: Tensor | Callable[[], Tensor]) -> Tensor:
    return channels if isinstance(channels, Tensor) else channels()


def backward(
    grad: Tensor,
    parts: list[Tensor],
    layout: list[int],
    low: Tensor | None,
    b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    tokens: int,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``low`` and ``b``; empty where there is none."""
    dense, context, k = dense_rows.shape[0], context_rows.shape[0], channels.shape[0]
    weight = weight_of(parts, layout)
    wide, kept = grad.split([dense * weight.channels, context * k])
    wide, kept = wide.view(dense, -1) if dense else wide.view(0, weight.channels), kept.view(context, k)
    grad_x, grad_low, grad_b = (grad.new_empty(0) for _ in range(3))
    if needs_input:
        weight = weight.once(dense > 0, grad.dtype)
        grad_x = (grad.new_empty if dense + context == tokens else grad.new_zeros)(tokens, weight.length)
        if dense:
            grad_x.index_copy_(0, dense_rows, product_nn(wide, weight))
        indexed_nn(NNOperands(kept, context_rows, channels, grad_x), weight)
    if low is not None and b is not None:
        grad_low, grad_b = torch.zeros_like(low), torch.zeros_like(b)
        grad_low.index_copy_(0, dense_rows, wide @ b).index_copy_(0, context_rows, kept @ b.index_select(0, channels))
        grad_b.addmm_(wide.t(), low.index_select(0, dense_rows))
        grad_b.index_add_(0, channels, kept.t() @ low.index_select(0, context_rows))
    return grad_x, grad_low, grad_b


def _backward_fake(grad: Tensor, parts: list[Tensor], layout: list[int], *rest: Any) -> tuple[Tensor, ...]:
    low, b, tokens, needs_input = rest[0], rest[1], rest[-2], rest[-1]
    like = (grad.new_empty(0) if t is None else torch.empty_like(t) for t in (low, b))
    length = weight_of(parts, layout).length
    return grad.new_empty(tokens, length) if needs_input else grad.new_empty(0), *like


_run_backward = register("ffn_up_backward", backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, parts, layout, _, low, b, *rows = inputs
    ctx.save_for_backward(low, b)
    hold(ctx, "parts", parts)
    hold(ctx, "rows", (*rows[:2], _known(rows[2])))
    ctx.layout, ctx.tokens = layout, x.shape[0]


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    (low, b), parts, needs_input = ctx.saved_tensors, held(ctx, "parts"), ctx.needs_input_grad[0]
    grads = _run_backward(grad.contiguous(), parts, ctx.layout, low, b, *held(ctx, "rows"), ctx.tokens, needs_input)
    update = (None, None) if low is None else grads[1:]
    return grads[0] if needs_input else None, [None] * len(parts), None, None, *update, None, None, None


_run = register_with_gradient("ffn_up", forward, _forward_fake, keep=_keep, gradients=_gradients)


def ffn_up(
    x: Tensor,
    weight: Weight,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor | Callable[[], Tensor],
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """The product with up; exact gradients for ``x`` and the low-rank update.

    Args:
        x: (T, H); any T, zero included.
        weight: (I, H), frozen; decoded to ``x.dtype``.
        dense_rows, context_rows, channels: as in :func:`gated_up`.
        bias: (I,), frozen.
        low, b: (T, R) first product of the LoRA branches, scaled, and (I, R), in ``x.dtype``; both or neither.

    Returns:
        (D·I + n·k,) in ``x.dtype``: the dense rows' (D, I), then the context rows' (n, k).

    Raises:
        ValueError: a weight or a bias is trainable, or half of a low-rank update is missing.
    """
    stored = unpack(weight)
    refuse_trainable("ffn_up", stored, bias)
    if (low is None) != (b is None):
        raise ValueError("ffn_up takes both of low and b or neither")
    if is_traced(x):
        channels = _known(channels)
    return _run(x, list(stored.parts), list(stored.layout), bias, low, b, dense_rows, context_rows, channels)
