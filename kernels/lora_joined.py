"""Three frozen linears of one input with a LoRA branch each (q, k, v of a layer), in one operation.

    Y_i = X · W_iᵀ + b_i + s_i · (X · A_iᵀ) · B_iᵀ        i = q, k, v

As :mod:`sparselora_kernels.lora_linear` computes each of them, by the order ``through_rank``; but ``X · [A_q A_k A_v]ᵀ`` is
one product, and so are its gradient and that of ``X``, which is summed in one buffer; the rows of dense tokens are copied
once for all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .columns import gather, scatter
from .formats import every_of, numbers_of
from .indexed_linear import indexed_nn, indexed_nt, linear, product_nn, product_nt
from .lora_linear import scaled_product
from .masters import cast, stack
from .operands import NNOperands, NTOperands
from .operator import held, hold, register, register_with_gradient
from .stored import EncodedWeight, Weight, refuse_trainable, unpack

COUNT = 3


def _matrices(parts: Sequence[Tensor], layouts: Sequence[int]) -> list[EncodedWeight]:
    """The matrices whose parts and layouts stand one after another."""
    found, part, number = [], 0, 0
    while number < len(layouts):
        layout = layouts[number : number + numbers_of(layouts[number:])]
        size = len(every_of(layout))
        found.append(EncodedWeight(list(parts[part : part + size]), list(layout)))
        part, number = part + size, number + len(layout)
    return found


def _low(x: Tensor, a: list[Tensor]) -> Tensor:
    """``x·[A]ᵀ``. On a CPU one by one: narrow products are summed in another order there, and are more exact in fp32."""
    if use_triton(x):
        return linear(x, stack(a, x.dtype))
    return torch.cat([linear(x, factor) for factor in cast(a, x.dtype)], 1)


def _forward(
    x: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    a_v: Tensor,
    b_q: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    parts: list[Tensor],
    layouts: list[int],
    biases: list[Tensor | None],
    scalings: list[float],
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three outputs (T, out_i), and ``x·[A]ᵀ`` (T, Σ r_i)."""
    low = _low(x, [a_q, a_k, a_v])
    lows = low.split([a.shape[0] for a in (a_q, a_k, a_v)], 1)
    some_dense = dense_rows is not None and dense_rows.numel() > 0
    dense = x.index_select(0, dense_rows) if some_dense and dense_rows is not None else None
    outputs = []
    for i, (weight, b) in enumerate(zip(_matrices(parts, layouts), cast((b_q, b_k, b_v), x.dtype))):
        kept, scaling, bias = channels[i], scalings[i], biases[i]
        if kept is None:
            y = product_nt(x, weight, bias=bias).addmm_(lows[i], b.t(), alpha=scaling)
        else:
            y = scaled_product(lows[i], b.t(), scaling)
            weight = weight.once(some_dense, x.dtype)
            if dense is not None and dense_rows is not None:
                y.index_add_(0, dense_rows, product_nt(dense, weight, bias=bias))
            scatter(indexed_nt(NTOperands(x, context_rows, kept, bias), weight), context_rows, kept, y, accumulate=True)
        outputs.append(y)
    return outputs[0], outputs[1], outputs[2], low


def _forward_fake(x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tokens, rank = x.shape[0], sum(a.shape[0] for a in inputs[:COUNT])
    return *(x.new_empty(tokens, b.shape[0]) for b in inputs[COUNT : 2 * COUNT]), x.new_empty(tokens, rank)


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    x: Tensor,
    low: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    a_v: Tensor,
    b_q: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    parts: list[Tensor],
    layouts: list[int],
    scalings: list[float],
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: list[Tensor | None],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (empty where it needs none), of ``[A]`` (Σ r_i, in), and of the three ``B`` one after another
    (Σ out_i·r_i,)."""
    grads, weights = (grad_q, grad_k, grad_v), _matrices(parts, layouts)
    z = torch.empty_like(low)
    ranks = [a.shape[0] for a in (a_q, a_k, a_v)]
    columns, lows = z.split(ranks, 1), low.split(ranks, 1)
    grad_b = low.new_empty(sum(b.numel() for b in (b_q, b_k, b_v)))
    places = [place.view(b.shape) for place, b in zip(_split(grad_b, (b_q, b_k, b_v)), (b_q, b_k, b_v))]
    for i, b in enumerate(cast((b_q, b_k, b_v), low.dtype)):
        columns[i].addmm_(grads[i], b, beta=0, alpha=scalings[i])
        places[i].addmm_(grads[i].t(), lows[i], beta=0, alpha=scalings[i])
    grad_a, grad_b = torch.mm(z.t(), x).to(a_q.dtype), grad_b.to(b_q.dtype)
    if not needs_input:
        return grad_q.new_empty(0), grad_a, grad_b
    some_dense = dense_rows is not None and dense_rows.numel() > 0
    weights = [weight.once(kept is None or some_dense, low.dtype) for weight, kept in zip(weights, channels)]
    grad_x = torch.mm(z, stack((a_q, a_k, a_v), z.dtype))
    dense: Tensor | None = None
    for grad, weight, kept in zip(grads, weights, channels):
        if kept is None:
            product_nn(grad, weight, onto=grad_x)
            continue
        if some_dense and dense_rows is not None:
            rows = grad.index_select(0, dense_rows)
            dense = product_nn(rows, weight, onto=dense)
        compact = gather(grad, context_rows, kept)
        indexed_nn(NNOperands(compact, context_rows, kept, grad_x, accumulate=True), weight)
    if dense is not None and dense_rows is not None:
        grad_x.index_add_(0, dense_rows, dense)
    return grad_x, grad_a, grad_b


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return flat.split([tensor.numel() for tensor in like])


def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, low, a, bs, needs_input = inputs[2], inputs[3], inputs[4], inputs[7:10], inputs[-1]
    grad_x = torch.empty_like(x) if needs_input else grad.new_empty(0)
    return grad_x, a.new_empty(low.shape[1], x.shape[1]), bs[0].new_empty(sum(b.numel() for b in bs))


_run_backward = register("lora_joined_backward", _backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[COUNT])
    ctx.save_for_backward(inputs[0], output[COUNT], *inputs[1 : 2 * COUNT + 1])
    parts, ctx.layouts, biases, ctx.scalings, *rows, channels = inputs[2 * COUNT + 1 :]
    # A list is one to PyTorch's tracers if it holds tensors only.
    ctx.whole = [all(isinstance(tensor, Tensor) for tensor in tensors) for tensors in (biases, channels)]
    hold(ctx, "parts", parts)
    hold(ctx, "rows", rows)
    hold(ctx, "channels", channels)


def _gradients(ctx: Any, *output_grads: Tensor | None) -> tuple:
    parts, channels = held(ctx, "parts"), held(ctx, "channels")
    no_bias, no_list = ([None] * COUNT if whole else None for whole in ctx.whole)
    none: tuple[Any, ...] = ([None] * len(parts), None, no_bias, None, None, None, no_list)
    if all(grad is None for grad in output_grads):
        return *[None] * (2 * COUNT + 1), *none
    x, low, *factors = ctx.saved_tensors
    pairs = zip(output_grads, factors[COUNT:])  # An output that nobody read has no gradient.
    grads = [x.new_zeros(x.shape[0], b.shape[0]) if grad is None else grad.contiguous() for grad, b in pairs]
    lists = ctx.scalings, *held(ctx, "rows"), channels
    grad_x, grad_a, grad_b = _run_backward(
        *grads, x, low, *factors, parts, ctx.layouts, *lists, ctx.needs_input_grad[0]
    )
    grad_as = grad_a.split([a.shape[0] for a in factors[:COUNT]])
    grad_bs = [part.view(b.shape) for part, b in zip(_split(grad_b, factors[COUNT:]), factors[COUNT:])]
    return grad_x if ctx.needs_input_grad[0] else None, *grad_as, *grad_bs, *none


_run = register_with_gradient("lora_joined", _forward, _forward_fake, keep=_keep, gradients=_gradients)


def lora_joined(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    dense_rows: Tensor | None = None,
    context_rows: Tensor | None = None,
    channels: Sequence[Tensor | None] = (None,) * COUNT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three frozen linears of one input with their LoRA branches; exact gradients for ``x``, ``a`` and ``b``.

    Args:
        x: (T, in); any T, zero included.
        weights: three of (out_i, in). Frozen; decoded to ``x.dtype``.
        biases: three of (out_i,), frozen, or ``None``.
        a, b: three of (r_i, in) and of (out_i, r_i), all of them trained or none, of one dtype; cast to ``x.dtype``.
        scalings: of the branches.
        dense_rows, context_rows: as in :func:`sparselora_kernels.lora_linear`; needed where ``channels`` has some.
        channels: the (k_i,) ascending int64 rows that context tokens take of each; ``None`` for one that is whole for all
            tokens.

    Returns:
        Three of (T, out_i) in ``x.dtype``.

    Raises:
        ValueError: a weight or a bias is trainable, or a list is missing.
    """
    stored = [unpack(weight) for weight in weights]
    for weight, bias in zip(stored, biases):
        refuse_trainable("lora_joined", weight, bias)
    if (dense_rows is None or context_rows is None) and any(kept is not None for kept in channels):
        raise ValueError("lora_joined takes both lists of rows where some channels are chosen")
    return _run(
        x,
        *a,
        *b,
        [part for weight in stored for part in weight.parts],
        [number for weight in stored for number in weight.layout],
        list(biases),
        list(scalings),
        dense_rows,
        context_rows,
        list(channels),
    )[:COUNT]
