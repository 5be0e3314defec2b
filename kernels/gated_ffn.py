"""Gate, up and activation of a sparse FFN, for dense and context tokens at once.

    H = act(X·Wgᵀ + bg + low_g·Bgᵀ) · (X·Wuᵀ + bu + low_u·Buᵀ)     (D, I) dense    (n, k) context

Dense tokens take all neurons, context tokens the rows ``channels`` of both matrices and of the LoRA factors ``B``. A
low-rank update is given as its first product ``low = s·X·Aᵀ``: dropout and several adapters stay with its maker. Each
frozen matrix is decoded once, in the forward and in the backward. What is kept for backward is the two
pre-activations; neither the input nor any copy of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gated_product import product, product_gradient
from .indexed_linear import add_update, product_nn, product_nt, triton_choice, vendor_nt
from .operands import NTOperands
from .operator import held, hold, is_traced, register, register_with_gradient
from .stored import EncodedWeight, Weight, refuse_trainable, unpack, weight_of


def _up(
    x: Tensor,
    gate_parts: list[Tensor],
    gate_layout: list[int],
    up_parts: list[Tensor],
    up_layout: list[int],
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gate_low: Tensor | None,
    gate_b: Tensor | None,
    up_low: Tensor | None,
    up_b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h`` of dense and of context tokens, then gate and up before the activation: ``g_d, u_d, g_c, u_c``.

    Called directly, ``channels`` may be a function that gives them, once the dense tokens are under way.
    """
    some_dense = dense_rows.numel() > 0
    gate = weight_of(gate_parts, gate_layout).once(some_dense, x.dtype)
    up = weight_of(up_parts, up_layout).once(some_dense, x.dtype)
    if some_dense:
        dense = x.index_select(0, dense_rows)
        g_d = add_update(product_nt(dense, gate, bias=gate_bias), _at(gate_low, dense_rows), gate_b)
        u_d = add_update(product_nt(dense, up, bias=up_bias), _at(up_low, dense_rows), up_b)
        h_d = product(g_d, u_d, activation)
    else:
        g_d, u_d, h_d = (x.new_empty(0, gate.channels) for _ in range(3))
    channels = _known(channels)
    matrices = triton_choice(
        "gated", x, [gate, up], context_rows.shape[0], channels, updates=gate_low is not None or up_low is not None
    )
    if matrices is not None:
        from .gpu.gated_ffn import gated_forward

        g_c, u_c, h_c = gated_forward(
            x,
            context_rows,
            matrices[0],
            matrices[1],
            channels,
            gate_bias=gate_bias,
            up_bias=up_bias,
            gate_low=gate_low,
            gate_b=gate_b,
            up_low=up_low,
            up_b=up_b,
            activation=activation,
        )
    else:
        context = x.index_select(0, context_rows)
        g_c = vendor_nt(NTOperands(context, None, channels, bias=gate_bias), gate)
        u_c = vendor_nt(NTOperands(context, None, channels, bias=up_bias), up)
        add_update(g_c, _at(gate_low, context_rows), _at(gate_b, channels))
        add_update(u_c, _at(up_low, context_rows), _at(up_b, channels))
        h_c = product(g_c, u_c, activation)
    return h_d, h_c, g_d, u_d, g_c, u_c


def _up_fake(x: Tensor, gate_parts: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    dense_rows, context_rows, channels = rest[-4:-1]
    wide = x.new_empty(dense_rows.shape[0], weight_of(gate_parts, rest[0]).channels)
    kept = x.new_empty(context_rows.shape[0], channels.shape[0])
    return wide, kept, *(torch.empty_like(t) for t in (wide, wide, kept, kept))


def _known(channels: Tensor | Callable[[], Tensor]) -> Tensor:
    return channels if isinstance(channels, Tensor) else channels()


def _at(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(0, rows)


def _up_backward(
    grad_dense: Tensor | None,
    grad_context: Tensor | None,
    g_d: Tensor,
    u_d: Tensor,
    g_c: Tensor,
    u_c: Tensor,
    gate_parts: list[Tensor],
    gate_layout: list[int],
    up_parts: list[Tensor],
    up_layout: list[int],
    gate_low: Tensor | None,
    gate_b: Tensor | None,
    up_low: Tensor | None,
    up_b: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    activation: str,
    tokens: int,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``gate_low``, ``gate_b``, ``up_low``, ``up_b``; empty where there is none."""
    some_dense = grad_dense is not None and grad_dense.shape[0] > 0
    gate = weight_of(gate_parts, gate_layout)
    up = weight_of(up_parts, up_layout)
    length, dtype = gate.length, g_c.dtype
    covered = (dense_rows.numel() if some_dense else 0) + (0 if grad_context is None else context_rows.numel())
    grad_x = g_c.new_empty(0)
    if needs_input:
        gate, up = gate.once(some_dense, dtype), up.once(some_dense, dtype)
        grad_x = (g_c.new_empty if covered == tokens else g_c.new_zeros)(tokens, length)
    branches = [
        (low, b, _zeros(low, tokens), _zeros(b, gate.channels)) for low, b in ((gate_low, gate_b), (up_low, up_b))
    ]
    if some_dense:
        assert grad_dense is not None
        pair = product_gradient(grad_dense.contiguous(), g_d, u_d, activation)
        if needs_input:
            dense = product_nn(pair[1], up, onto=product_nn(pair[0], gate))
            grad_x.index_copy_(0, dense_rows, dense)
        for grad, (low, b, grad_low, grad_b) in zip(pair, branches):
            if low is not None and b is not None:
                grad_low.index_copy_(0, dense_rows, grad @ b)
                grad_b.addmm_(grad.t(), low.index_select(0, dense_rows))
    if grad_context is not None and grad_context.shape[0]:
        pair = product_gradient(grad_context.contiguous(), g_c, u_c, activation)
        if needs_input:
            _context_input_gradient(pair, gate, up, context_rows, channels, grad_x)
        for grad, (low, b, grad_low, grad_b) in zip(pair, branches):
            if low is not None and b is not None:
                grad_low.index_copy_(0, context_rows, grad @ b.index_select(0, channels))
                grad_b.index_add_(0, channels, grad.t() @ low.index_select(0, context_rows))
    return grad_x, branches[0][2], branches[0][3], branches[1][2], branches[1][3]


def _context_input_gradient(
    pair: tuple[Tensor, Tensor], gate: EncodedWeight, up: EncodedWeight, rows: Tensor, channels: Tensor, out: Tensor
) -> None:
    matrices = triton_choice("gradient", out, [gate, up], rows.shape[0], channels)
    if matrices is not None:
        from .gpu.gated_gradient import gated_input_gradient

        gated_input_gradient(*pair, matrices[0], matrices[1], rows, channels, out)
        return
    out.index_copy_(0, rows, product_nn(pair[1], up, channels, onto=product_nn(pair[0], gate, channels)))


def _zeros(like: Tensor | None, rows: int) -> Tensor:
    return torch.empty(0) if like is None else like.new_zeros(rows, like.shape[1])


def _up_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    g_c, gate_parts, gate_layout = args[4], args[6], args[7]
    tokens, needs_input = args[18], args[19]
    width = weight_of(gate_parts, gate_layout).length
    like = (g_c.new_empty(0) if t is None else torch.empty_like(t) for t in args[10:14])
    return g_c.new_empty(tokens, width) if needs_input else g_c.new_empty(0), *like


_run_backward = register("gated_up_backward", _up_backward, _up_backward_fake)


def _keep_up(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, gate_parts, gate_layout, up_parts, up_layout, _, _, *rest = inputs
    lows, rows, activation = rest[:4], rest[4:7], rest[7]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[2:], *lows)
    hold(ctx, "gate", gate_parts)
    hold(ctx, "up", up_parts)
    hold(ctx, "rows", (*rows[:2], _known(rows[2])))
    ctx.layouts = gate_layout, up_layout
    ctx.activation, ctx.tokens = activation, x.shape[0]


def _up_gradients(ctx: Any, grad_dense: Tensor | None, grad_context: Tensor | None, *_: Any) -> tuple:
    none: list[Any] = [None] * 15
    gate, up = held(ctx, "gate"), held(ctx, "up")
    none[1], none[3] = [None] * len(gate), [None] * len(up)
    if grad_dense is None and grad_context is None:
        return tuple(none)
    saved = ctx.saved_tensors
    lows = saved[4:]
    grads = _run_backward(
        grad_dense,
        grad_context,
        *saved[:4],
        gate,
        ctx.layouts[0],
        up,
        ctx.layouts[1],
        *lows,
        *held(ctx, "rows"),
        ctx.activation,
        ctx.tokens,
        ctx.needs_input_grad[0],
    )
    none[0] = grads[0] if ctx.needs_input_grad[0] else None
    none[7:11] = [None if low is None else grad for low, grad in zip(lows, grads[1:])]
    return tuple(none)


_run = register_with_gradient("gated_up", _up, _up_fake, keep=_keep_up, gradients=_up_gradients)


def gated_up(
    x: Tensor,
    gate: Weight,
    up: Weight,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor | Callable[[], Tensor],
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_low: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_low: Tensor | None = None,
    up_b: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """``act(gate(x)) * up(x)``; exact gradients for ``x`` and the low-rank updates.

    Args:
        x: (T, H); any T, zero included.
        gate, up: (I, H), frozen; decoded to ``x.dtype``.
        dense_rows, context_rows: disjoint int64 rows of ``x``.
        channels: (k,) int64 ascending, the neurons that context tokens take; or a function that gives them, always the
            same. It is called after the dense tokens' products were issued, so that it may wait for something.
        gate_bias, up_bias: (I,), frozen.
        gate_low, up_low: (T, R) first products of the LoRA branches, scaled; with ``gate_b``, ``up_b`` (I, R).
            In ``x.dtype``.
        activation: a name that :func:`sparselora_kernels.activations.activate` knows.

    Returns:
        (D, I) for the dense rows and (n, k) for the context rows, in ``x.dtype``.

    Raises:
        ValueError: a weight or a bias is trainable, or half of a low-rank update is missing.
    """
    stored = unpack(gate), unpack(up)
    for weight, bias in zip(stored, (gate_bias, up_bias)):
        refuse_trainable("gated_up", weight, bias)
    if (gate_low is None) != (gate_b is None) or (up_low is None) != (up_b is None):
        raise ValueError("gated_up takes both of low and b or neither")
    if is_traced(x):
        channels = _known(channels)
    return _run(
        x,
        list(stored[0].parts),
        list(stored[0].layout),
        list(stored[1].parts),
        list(stored[1].layout),
        gate_bias,
        up_bias,
        gate_low,
        gate_b,
        up_low,
        up_b,
        dense_rows,
        context_rows,
        channels,
        activation,
    )[:2]
