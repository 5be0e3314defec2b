"""Products with a masked adapter's weight ``Ŵ = (W + s·B·A) ⊙ (W ≠ 0)``, whole or for chosen tokens and channels.

    Y = X · Ŵᵀ + b         dX = dY · Ŵ
    exact                  G = s·(dYᵀX) ⊙ (W ≠ 0)       dB = G·Aᵀ                 dA = Bᵀ·G
    straight-through       LoRS, arXiv 2501.08582       dB = s·dYᵀ(X·Aᵀ)          dA = s·(dY·B)ᵀX

The base's products are those of :mod:`.lora_linear`, :mod:`.ffn_up` and :mod:`.ffn_down`, each with ``Ŵ`` in the place of
``W`` and without a branch of its own: context tokens take the kept channels of ``Ŵ``. ``Ŵ`` and ``G`` live one after the
other, for one product. What is kept for backward is what plain LoRA keeps: the input and the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .columns import gather
from .ffn_down import backward as down_backward
from .ffn_down import forward as down_forward
from .ffn_up import backward as up_backward
from .ffn_up import forward as up_forward
from .formats import PLAIN
from .lora_linear import backward as linear_backward
from .lora_linear import forward as linear_forward
from .masked_gradient import Pair, factor_gradients
from .masked_weight import masked_weight
from .masters import cast
from .operator import held, hold, is_traced, register, register_with_gradient
from .stored import Weight, refuse_trainable, unpack, weight_of

Gradient = Literal["exact", "straight_through"]

# What the channels are, and where tokens stand: rows of W for tokens at their places (q, k, v), its columns (o), rows for
# tokens in a line (gate, up), columns for those (down). Columns are stored as rows.
_OUTPUTS, _INPUTS, _UP, _DOWN = range(4)
_TRANSPOSED = (_INPUTS, _DOWN)


def _factors(a: Tensor, b: Tensor, form: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``P`` (C, r) and ``Q`` (r, length) beside the stored matrix."""
    a, b = cast((a, b), dtype)
    return (a.t(), b.t()) if form in _TRANSPOSED else (b, a)


def _forward(
    x: Tensor,
    h_context: Tensor | None,
    parts: list[Tensor],
    layout: list[int],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: Tensor | None,
    form: int,
    tokens: int,
    straight: bool,
) -> Tensor:
    """Called directly, ``channels`` may be a function that gives them (of :func:`masked_up`)."""
    own = [masked_weight(weight_of(parts, layout), *_factors(a, b, form, x.dtype), scaling)]
    plain = list(PLAIN)
    if form in (_OUTPUTS, _INPUTS):
        lists = dense_rows, context_rows, channels
        return linear_forward(x, own, plain, bias, None, None, 1.0, *lists, form == _INPUTS, False)[0]
    assert dense_rows is not None and context_rows is not None and channels is not None
    if form == _UP:
        return up_forward(x, own, plain, bias, None, None, dense_rows, context_rows, channels)
    assert h_context is not None
    return down_forward(
        x, h_context, own, plain, bias, None, None, None, dense_rows, context_rows, channels, tokens
    )  # fmt: skip


def _forward_fake(
    x: Tensor, h_context: Tensor | None, parts: list[Tensor], layout: list[int], *rest: Any
) -> Tensor:  # fmt: skip
    dense_rows, context_rows, channels, form, tokens, _ = rest[-6:]
    weight = weight_of(parts, layout)
    if form == _UP:
        return x.new_empty(dense_rows.shape[0] * weight.channels + context_rows.shape[0] * channels.shape[0])
    outputs = weight.length if form in _TRANSPOSED else weight.channels
    return x.new_empty(tokens if form == _DOWN else x.shape[0], outputs)


def _backward(
    grad: Tensor,
    x: Tensor,
    h_context: Tensor | None,
    parts: list[Tensor],
    layout: list[int],
    a: Tensor,
    b: Tensor,
    scaling: float,
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: Tensor | None,
    form: int,
    straight: bool,
    needs_input: bool,
    needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``h_context``, ``a`` and ``b``; empty where there is none."""
    weight = weight_of(parts, layout)
    p, q = _factors(a, b, form, grad.dtype)
    lists = dense_rows, context_rows, channels
    grad_x, grad_h, grad_a, grad_b = (grad.new_empty(0) for _ in range(4))
    if needs_input:
        own = [masked_weight(weight, p, q, scaling)]
        grad_x, grad_h = _input_gradients(grad, own, x.shape[0], grad_h, lists, form)
        del own
    if needs_factors:
        pairs = _pairs(grad, x, h_context, lists, form, weight.channels)
        grad_p, grad_q = factor_gradients(weight, pairs, p, q, scaling, straight)
        grad_a, grad_b = (grad_p.t(), grad_q.t()) if form in _TRANSPOSED else (grad_q, grad_p)
        grad_a, grad_b = (g.to(f.dtype).contiguous() for g, f in ((grad_a, a), (grad_b, b)))
    return grad_x, grad_h, grad_a, grad_b


def _input_gradients(
    grad: Tensor, own: list[Tensor], tokens: int, none: Tensor, lists: tuple[Any, Any, Any], form: int
) -> tuple[Tensor, Tensor]:
    plain = list(PLAIN)
    if form == _DOWN:
        return down_backward(grad, own, plain, None, None, None, *lists)[:2]
    if form == _UP:
        return up_backward(grad, own, plain, None, None, *lists, tokens, True)[0], none
    no_branch = None, none, own, plain, None, None, 1.0
    return linear_backward(grad, *no_branch, *lists, form == _INPUTS, False, True)[0], none


def _pairs(
    grad: Tensor, x: Tensor, h_context: Tensor | None, lists: tuple[Any, Any, Any], form: int, width: int
) -> Iterator[Pair]:
    """Of dense tokens, then of context tokens; of all, where there are no lists."""
    dense, context, channels = lists
    if dense is None:
        yield (x, grad, None) if form == _INPUTS else (grad, x, None)
        return
    if form == _UP:
        wide, kept = grad.split([dense.shape[0] * width, context.shape[0] * channels.shape[0]])
        yield wide.view(-1, width), x.index_select(0, dense), None
        yield kept.view(-1, channels.shape[0]), x.index_select(0, context), channels
    elif form == _DOWN:
        assert h_context is not None
        yield x, grad.index_select(0, dense), None
        yield h_context, grad.index_select(0, context), channels
    else:
        inner, outer = (x, grad) if form == _INPUTS else (grad, x)
        yield inner.index_select(0, dense), outer.index_select(0, dense), None
        yield gather(inner, context, channels), outer.index_select(0, context), channels


def _backward_fake(
    grad: Tensor, x: Tensor, h_context: Tensor | None, parts: list[Tensor], layout: list[int], a: Tensor, b: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs_input, needs_factors = rest[-2:]
    inputs = (torch.empty_like(t) if needs_input and t is not None else grad.new_empty(0) for t in (x, h_context))
    factors = (torch.empty_like(t) if needs_factors else grad.new_empty(0) for t in (a, b))
    return *inputs, *factors


_run_backward = register("masked_linear_backward", _backward, _backward_fake)


def _known(channels: Tensor | Callable[[], Tensor] | None) -> Tensor | None:
    return channels if channels is None or isinstance(channels, Tensor) else channels()


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, h_context, parts, layout, _, a, b, scaling, dense_rows, context_rows, channels, form, _, straight = inputs
    ctx.save_for_backward(x, h_context, a, b)
    hold(ctx, "parts", parts)
    hold(ctx, "lists", (dense_rows, context_rows, _known(channels)))
    ctx.layout, ctx.scaling, ctx.form, ctx.straight = layout, scaling, form, straight


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    x, h_context, a, b = ctx.saved_tensors
    parts, needs = held(ctx, "parts"), ctx.needs_input_grad
    needs_input, needs_factors = needs[0] or needs[1], any(needs[5:7])
    grads = _run_backward(
        grad.contiguous(), x, h_context, parts, ctx.layout, a, b, ctx.scaling, *held(ctx, "lists"), ctx.form,
        ctx.straight, needs_input, needs_factors,
    )  # fmt: skip
    grad_x, grad_h = (g if needs[i] else None for i, g in enumerate(grads[:2]))
    grad_a, grad_b = (g if needs_factors else None for g in grads[2:])
    return grad_x, grad_h, [None] * len(parts), None, None, grad_a, grad_b, *[None] * 7


_run = register_with_gradient("masked_linear", _forward, _forward_fake, keep=_keep, gradients=_gradients)


def _call(
    x: Tensor,
    h_context: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    lists: tuple[Any, Any, Any],
    form: int,
    tokens: int,
    gradient: Gradient,
) -> Tensor:
    stored = unpack(weight)
    refuse_trainable("masked_linear", stored, bias)
    straight = gradient == "straight_through"
    parts, layout = list(stored.parts), list(stored.layout)
    return _run(x, h_context, parts, layout, bias, a, b, scaling, *lists, form, tokens, straight)


def masked_linear(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    dense_rows: Tensor | None = None,
    context_rows: Tensor | None = None,
    channels: Tensor | None = None,
    transposed: bool = False,
    gradient: Gradient = "exact",
) -> Tensor:
    """``X · Ŵᵀ + b``, whole or for chosen tokens and channels; gradients for ``x``, ``a`` and ``b``.

    Args:
        x: (T, in); any T, zero included.
        weight: ``W`` (out, in), or (in, out) when transposed: the channel is dim 0. Frozen; its zeros are the mask.
        a, b: (r, in) and (out, r), cast to ``x.dtype``.
        scaling: ``s``.
        bias: (out,), frozen.
        dense_rows, context_rows, channels: as :func:`lora_linear` has them; but the branch is in ``Ŵ``, so that context
            tokens take it with the kept channels, and rows in neither list are zero.
        transposed: the stored matrix is (in, out), its channels are inputs.
        gradient: of the factors, ``exact`` or ``straight_through``; that of ``x`` is exact in both.

    Returns:
        (T, out) in ``x.dtype``.

    Raises:
        ValueError: ``weight`` or ``bias`` is trainable; a list is missing.
    """
    if len({dense_rows is None, context_rows is None, channels is None}) > 1:
        raise ValueError("masked_linear takes all three index lists or none")
    lists, form = (dense_rows, context_rows, channels), _INPUTS if transposed else _OUTPUTS
    return _call(x, None, weight, bias, a, b, scaling, lists, form, 0, gradient)


def masked_up(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor | Callable[[], Tensor],
    *,
    bias: Tensor | None = None,
    gradient: Gradient = "exact",
) -> Tensor:
    """The first product of an FFN, :func:`ffn_up` with ``Ŵ``: (D·I + n·k,) in ``x.dtype``. Arguments as there and in
    :func:`masked_linear`."""
    if is_traced(x):
        channels = _known(channels)
    lists = dense_rows, context_rows, channels
    return _call(x, None, weight, bias, a, b, scaling, lists, _UP, 0, gradient)


def masked_down(
    h_dense: Tensor,
    h_context: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    tokens: int,
    *,
    bias: Tensor | None = None,
    gradient: Gradient = "exact",
) -> Tensor:
    """The last product of an FFN, :func:`ffn_down` with ``Ŵ``: (tokens, H). Arguments as there and in
    :func:`masked_linear`, ``weight`` (I, H)."""
    lists = dense_rows, context_rows, channels
    return _call(h_dense, h_context, weight, bias, a, b, scaling, lists, _DOWN, tokens, gradient)
