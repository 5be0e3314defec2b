"""Products of runs of rows with one matrix each: what a mixture's experts are made of.

    grouped_linear     Y[s] = X[s] · W_e[channels]ᵀ   or, transposed,   X[s] · W_e[channels]      W frozen, stored by row
    grouped_product    Y[s] = X[s] · V_eᵀ                                                         V trained

Row s belongs to expert e if ``ends[e-1] <= s < ends[e]``. A bank of experts is one stored matrix (E·C, length), expert
after expert, and ``channels`` are rows of it, as many of every expert. On a GPU in bf16 all experts are one launch
(:func:`torch.nn.functional.grouped_mm`), and ``ends`` is read there; on a CPU every expert that has rows is a GEMM. What
a gradient keeps of a frozen bank is the parts as they are stored; kept rows are decoded once in the forward and once in
the backward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backend import use_triton
from .operator import held, hold, register, register_with_gradient
from .stored import EncodedWeight, Weight, refuse_trainable, unpack

_launch = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
# Rows of an operand must begin at multiples of 16 bytes.
_ALIGNED = 16


def runs(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first, end) of the runs that are not empty. Waits for the device."""
    bounds = [0, *ends.tolist()]
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]


def _widened(x: Tensor, *sides: int) -> Tensor:
    """Zeros behind the given sides, so that rows are aligned."""
    unit = _ALIGNED // x.itemsize
    extra = [-x.shape[side] % unit if side in sides else 0 for side in range(x.dim())]
    return pad(x, [n for more in reversed(extra) for n in (0, more)]) if any(extra) else x


def _by_launch(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x`` (S, M), ``weight`` (E, M, N) -> (S, N)."""
    assert _launch is not None
    wide = _widened(weight, 1, 2)
    return _launch(_widened(x, 1), wide, offs=ends)[:, : weight.shape[2]]


def one_launch(x: Tensor) -> bool:
    """Whether the products of all experts are one launch."""
    return use_triton(x) and _launch is not None and x.dtype == torch.bfloat16


# --- frozen -----------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor, parts: list[Tensor], layout: list[int], ends: Tensor, channels: Tensor | None, transposed: bool
) -> Tensor:
    weight, experts = EncodedWeight(parts, layout), ends.shape[0]
    kept = (weight.channels if channels is None else channels.shape[0]) // experts
    if one_launch(x):
        rows = weight.decode(channels, x.dtype).view(experts, kept, weight.length)
        return _by_launch(x.contiguous(), rows if transposed else rows.transpose(1, 2), ends)
    y = x.new_empty(x.shape[0], weight.length if transposed else kept)
    for expert, first, end in runs(ends):
        rows = _rows_of(weight, channels, slice(expert * kept, (expert + 1) * kept), x)
        torch.mm(x[first:end], rows if transposed else rows.t(), out=y[first:end])
    return y


def _rows_of(weight: EncodedWeight, channels: Tensor | None, part: slice, x: Tensor) -> Tensor:
    if channels is None and weight.plain:
        return weight.parts[0][part].to(x.dtype)
    chosen = torch.arange(part.start, part.stop, device=x.device) if channels is None else channels[part]
    return weight.decode(chosen, x.dtype)


def _linear_fake(
    x: Tensor, parts: list[Tensor], layout: list[int], ends: Tensor, channels: Any, transposed: bool
) -> Tensor:
    weight = EncodedWeight(parts, layout)
    kept = (weight.channels if channels is None else channels.shape[0]) // ends.shape[0]
    return x.new_empty(x.shape[0], weight.length if transposed else kept)


_run_other = register("grouped_linear_backward", _linear, _linear_fake)


def _keep_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    # Nothing is saved, so that checkpointing does not run the last product again.
    hold(ctx, "parts", inputs[1])
    hold(ctx, "lists", inputs[3:5])
    ctx.layout, ctx.transposed = inputs[2], inputs[5]


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple:
    parts = held(ctx, "parts")
    found = _run_other(grad.contiguous(), parts, ctx.layout, *held(ctx, "lists"), not ctx.transposed)
    return found, [None] * len(parts), None, None, None, None


_run_linear = register_with_gradient(
    "grouped_linear", _linear, _linear_fake, keep=_keep_linear, gradients=_linear_gradients
)


def grouped_linear(
    x: Tensor, weight: Weight, ends: Tensor, channels: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """The products of each run with its expert's kept rows; exact gradient for ``x``.

    Args:
        x: (S, length), or (S, k) where it is ``transposed``; any S, zero included.
        weight: (E·C, length), frozen; decoded to ``x.dtype``.
        ends: (E,) int32.
        channels: (E·k,) int64 rows of ``weight``, k of each expert in the order of the experts; ``None`` for all.

    Returns:
        (S, k), or (S, length).

    Raises:
        ValueError: the weight is trainable.
    """
    stored = unpack(weight)
    refuse_trainable("grouped_linear", stored, None)
    return _run_linear(x, list(stored.parts), list(stored.layout), ends, channels, transposed)


# --- trained ----------------------------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if one_launch(x):
        return _by_launch(x.contiguous(), weight.transpose(1, 2), ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for expert, first, end in runs(ends):
        torch.mm(x[first:end], weight[expert].t(), out=y[first:end])
    return y


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``; empty where none is asked for."""
    grad_x, grad_weight = grad.new_empty(0), grad.new_empty(0)
    if one_launch(grad):
        if needs_input:
            grad_x = _by_launch(grad, weight, ends)
        if needs_weight:
            assert _launch is not None
            wide = _launch(_widened(grad, 1).t(), _widened(x.contiguous(), 1), offs=ends)
            # What no row belongs to is left as it was.
            some = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
            grad_weight = wide[:, : grad.shape[1], : x.shape[1]].where(some[:, None, None], wide.new_zeros(()))
        return grad_x, grad_weight
    if needs_input:
        grad_x = grad.new_empty(grad.shape[0], weight.shape[2])
    if needs_weight:
        grad_weight = torch.zeros_like(weight)
    for expert, first, end in runs(ends):
        if needs_input:
            torch.mm(grad[first:end], weight[expert], out=grad_x[first:end])
        if needs_weight:
            torch.mm(grad[first:end].t(), x[first:end], out=grad_weight[expert])
    return grad_x, grad_weight


def _product_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, needs_input: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    none = grad.new_empty(0)
    grad_x = grad.new_empty(grad.shape[0], weight.shape[2]) if needs_input else none
    return grad_x, torch.empty_like(weight) if needs_weight else grad.new_empty(0)


_run_product_backward = register("grouped_product_backward", _product_backward, _product_backward_fake)


def _keep_product(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    hold(ctx, "ends", inputs[2:])


def _product_gradients(ctx: Any, grad: Tensor) -> tuple:
    needs = ctx.needs_input_grad[:2]
    found = _run_product_backward(grad.contiguous(), *ctx.saved_tensors, *held(ctx, "ends"), *needs)
    return *(one if need else None for one, need in zip(found, needs)), None


_run_product = register_with_gradient(
    "grouped_product",
    _product,
    lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
    keep=_keep_product,
    gradients=_product_gradients,
)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The products of each run with its expert's trained matrix; exact gradients for both.

    Args:
        x: (S, M); any S, zero included.
        weight: (E, N, M), in ``x.dtype``.
        ends: (E,) int32.

    Returns:
        (S, N).
    """
    return _run_product(x, weight.contiguous(), ends)
