"""FLOPs of the registered operations, for ``torch.utils.flop_counter.FlopCounterMode``, which cannot see inside a node.

As that mode counts aten's: 2 per multiply-add of the matrix products, nothing for elementwise work or decoding. Import
this module to count; nothing else does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import ffn_down, ffn_up, gated_ffn, grouped, lora_joined, masked_linear  # noqa: F401  (registered when imported)
from .formats import PLAIN, every_of, numbers_of
from .lora_linear import lora_order
from .stored import split_layout

Shape = Any
_OPS = torch.ops.sparselora

# In eager mode the products themselves are seen, except this form of one, which PyTorch forgets.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


def _matrix(parts: list[Shape], layout: list[int]) -> tuple[int, int]:
    """(channels, length)."""
    own, rows = split_layout(layout)
    return rows[1] if rows else parts[0][0], parts[0][1] if own[0] == PLAIN[0] else own[1]


def _base(tokens: int, matrix: tuple[int, int], dense: Shape, context: Shape, kept: Shape) -> int:
    """One product with a frozen matrix."""
    if dense is None:
        return 2 * tokens * matrix[0] * matrix[1]
    return 2 * matrix[1] * (dense[0] * matrix[0] + context[0] * kept[0])


@register_flop_formula(_OPS.lora_linear)
def _lora_linear(
    x: Shape, parts: Any, layout: Any, bias: Shape, a: Shape, b: Shape, scaling: float, dense: Shape, context: Shape,
    kept: Shape, transposed: bool, merge: bool, **_: Any,
) -> int:  # fmt: skip
    base = _base(x[0], _matrix(parts, layout), dense, context, kept)
    if a is None:
        return base
    rank, inputs, outputs = a[0], a[1], b[0]
    merged, _order = lora_order(x[0], inputs, outputs, rank, merge=merge and dense is None)
    return base + 2 * rank * (inputs * outputs if merged else x[0] * (inputs + outputs))


@register_flop_formula(_OPS.lora_linear_backward)
def _lora_linear_backward(
    grad: Shape, x: Shape, low: Shape, parts: Any, layout: Any, a: Shape, b: Shape, scaling: float, dense: Shape,
    context: Shape, kept: Shape, transposed: bool, merge: bool, needs_input: bool, **_: Any,
) -> int:  # fmt: skip
    tokens = grad[0]
    base = _base(tokens, _matrix(parts, layout), dense, context, kept) if needs_input else 0
    if a is None:
        return base
    rank, inputs, outputs = a[0], a[1], b[0]
    merged, order = lora_order(tokens, inputs, outputs, rank, merge=merge and dense is None)
    through_rank = order == "through_rank"
    products, trained = 0, x is not None
    if not merged or (trained and through_rank):
        products += tokens * outputs * rank
    if trained and through_rank:
        products += tokens * rank * (inputs + outputs) + (tokens * inputs * rank if merged else 0)
    elif trained:
        products += tokens * inputs * outputs + 2 * inputs * outputs * rank
    if needs_input:
        products += inputs * outputs * rank if merged else tokens * rank * inputs
    return base + 2 * products


def _joined_base(
    tokens: int, parts: Any, layouts: list[int], dense: Shape, context: Shape, channels: list[Shape]
) -> int:
    """One product with each of three frozen matrices, whose parts and layouts stand one after another."""
    total = 0
    for kept in channels:
        base = parts[:1], layouts[: numbers_of(layouts)]
        parts, layouts = parts[len(every_of(base[1])) :], layouts[len(base[1]) :]
        total += _base(tokens, _matrix(*base), None if kept is None else dense, context, kept)
    return total


@register_flop_formula(_OPS.lora_joined)
def _lora_joined(
    x: Shape, a_q: Shape, a_k: Shape, a_v: Shape, b_q: Shape, b_k: Shape, b_v: Shape, parts: Any, layouts: Any,
    biases: Any, scalings: Any, dense: Shape, context: Shape, channels: Any, **_: Any,
) -> int:  # fmt: skip
    branches = sum(a[0] * (a[1] + b[0]) for a, b in ((a_q, b_q), (a_k, b_k), (a_v, b_v)))
    return _joined_base(x[0], parts, layouts, dense, context, channels) + 2 * x[0] * branches


@register_flop_formula(_OPS.lora_joined_backward)
def _lora_joined_backward(
    grad_q: Shape, grad_k: Shape, grad_v: Shape, x: Shape, low: Shape, a_q: Shape, a_k: Shape, a_v: Shape, b_q: Shape,
    b_k: Shape, b_v: Shape, parts: Any, layouts: Any, scalings: Any, dense: Shape, context: Shape, channels: Any,
    needs_input: bool, **_: Any,
) -> int:  # fmt: skip
    base = _joined_base(x[0], parts, layouts, dense, context, channels) if needs_input else 0
    outputs = sum(b[0] * b[1] for b in (b_q, b_k, b_v))
    return base + 2 * x[0] * (2 * outputs + low[1] * x[1] * (2 if needs_input else 1))


def _update(low: Shape, b: Shape, dense: Shape, context: Shape, kept: Shape) -> int:
    """A low-rank update whose outputs are the neurons."""
    return 0 if low is None else 2 * low[1] * (dense[0] * b[0] + context[0] * kept[0])


@register_flop_formula(_OPS.gated_up)
def _gated_up(
    x: Shape, gate: Any, gate_layout: Any, up: Any, up_layout: Any, gate_bias: Shape, up_bias: Shape, gate_low: Shape,
    gate_b: Shape, up_low: Shape, up_b: Shape, dense: Shape, context: Shape, kept: Shape, activation: str, **_: Any,
) -> int:  # fmt: skip
    lists = dense, context, kept
    base = 2 * _base(x[0], _matrix(gate, gate_layout), *lists)
    return base + _update(gate_low, gate_b, *lists) + _update(up_low, up_b, *lists)


@register_flop_formula(_OPS.gated_up_backward)
def _gated_up_backward(
    grad_dense: Shape, grad_context: Shape, g_d: Shape, u_d: Shape, g_c: Shape, u_c: Shape, gate: Any,
    gate_layout: Any, up: Any, up_layout: Any, gate_low: Shape, gate_b: Shape, up_low: Shape, up_b: Shape, dense: Shape,
    context: Shape, kept: Shape, activation: str, tokens: int, needs_input: bool, **_: Any,
) -> int:  # fmt: skip
    lists = dense, context, kept
    base = 2 * _base(tokens, _matrix(gate, gate_layout), *lists) if needs_input else 0
    # The gradients of both factors.
    return base + 2 * (_update(gate_low, gate_b, *lists) + _update(up_low, up_b, *lists))


@register_flop_formula(_OPS.ffn_up)
def _ffn_up(
    x: Shape, parts: Any, layout: Any, bias: Shape, low: Shape, b: Shape, dense: Shape, context: Shape, kept: Shape,
    **_: Any,
) -> int:  # fmt: skip
    lists = dense, context, kept
    return _base(x[0], _matrix(parts, layout), *lists) + _update(low, b, *lists)


@register_flop_formula(_OPS.ffn_up_backward)
def _ffn_up_backward(
    grad: Shape, parts: Any, layout: Any, low: Shape, b: Shape, dense: Shape, context: Shape, kept: Shape, tokens: int,
    needs_input: bool, **_: Any,
) -> int:  # fmt: skip
    lists = dense, context, kept
    base = _base(tokens, _matrix(parts, layout), *lists) if needs_input else 0
    return base + 2 * _update(low, b, *lists)


@register_flop_formula(_OPS.ffn_down)
def _ffn_down(
    h_dense: Shape, h_context: Shape, parts: Any, layout: Any, bias: Shape, low_dense: Shape, low_context: Shape,
    b: Shape, dense: Shape, context: Shape, kept: Shape, tokens: int, **_: Any,
) -> int:  # fmt: skip
    base = _base(tokens, _matrix(parts, layout), dense, context, kept)
    return base if b is None else base + 2 * (dense[0] + context[0]) * b[0] * b[1]


@register_flop_formula(_OPS.ffn_down_backward)
def _ffn_down_backward(
    grad: Shape, parts: Any, layout: Any, low_dense: Shape, low_context: Shape, b: Shape, dense: Shape, context: Shape,
    kept: Shape, **_: Any,
) -> int:  # fmt: skip
    base = _base(grad[0], _matrix(parts, layout), dense, context, kept)
    return base if b is None else base + 4 * (dense[0] + context[0]) * b[0] * b[1]


def _pairs(tokens: int, matrix: tuple[int, int], dense: Shape, context: Shape, kept: Shape) -> list[tuple[int, int]]:
    """Tokens and channels that meet in products with a masked adapter's weight: of dense tokens, of context tokens."""
    return [(tokens, matrix[0])] if dense is None else [(dense[0], matrix[0]), (context[0], kept[0])]


@register_flop_formula(_OPS.masked_linear)
def _masked_linear(
    x: Shape, h: Shape, parts: Any, layout: Any, bias: Shape, a: Shape, b: Shape, scaling: float, dense: Shape,
    context: Shape, kept: Shape, *options: Any, **_: Any,
) -> int:  # fmt: skip
    matrix = _matrix(parts, layout)
    return _base(x[0], matrix, dense, context, kept) + 2 * matrix[0] * matrix[1] * a[0]


@register_flop_formula(_OPS.masked_linear_backward)
def _masked_linear_backward(
    grad: Shape, x: Shape, h: Shape, parts: Any, layout: Any, a: Shape, b: Shape, scaling: float, dense: Shape,
    context: Shape, kept: Shape, form: int, straight: bool, needs_input: bool, needs_factors: bool, **_: Any,
) -> int:  # fmt: skip
    matrix, rank = _matrix(parts, layout), a[0]
    total = 0
    if needs_input:
        total += _base(x[0], matrix, dense, context, kept) + 2 * matrix[0] * matrix[1] * rank
    for tokens, channels in _pairs(x[0], matrix, dense, context, kept) if needs_factors else ():
        order = lora_order(tokens, matrix[1], channels, rank)[1]
        if not tokens:
            continue
        if straight and order == "through_rank":
            total += 4 * tokens * rank * (matrix[1] + channels)
        else:
            total += 2 * channels * matrix[1] * (tokens + 2 * rank)
    return total


def _grouped_linear(x: Shape, parts: Any, layout: Any, ends: Shape, kept: Shape, transposed: bool, **_: Any) -> int:
    """Every row with one expert's kept rows, whatever experts there are."""
    channels, length = _matrix(parts, layout)
    return 2 * x[0] * (channels if kept is None else kept[0]) // ends[0] * length


register_flop_formula(_OPS.grouped_linear)(_grouped_linear)
register_flop_formula(_OPS.grouped_linear_backward)(_grouped_linear)


@register_flop_formula(_OPS.grouped_product)
def _grouped_product(x: Shape, weight: Shape, ends: Shape, **_: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(_OPS.grouped_product_backward)
def _grouped_product_backward(
    grad: Shape, x: Shape, weight: Shape, ends: Shape, needs_input: bool, needs_weight: bool, **_: Any
) -> int:
    return 2 * grad[0] * weight[1] * weight[2] * (needs_input + needs_weight)
