"""A frozen linear and its LoRA branch in one operation, whole or for chosen tokens and channels.

    Y = X · Wᵀ + b + s · (X · Aᵀ) · Bᵀ

Dense tokens take all of ``W``; context tokens the rows ``channels`` of it (q, k, v: zero elsewhere) or, with the matrix
stored transposed, its columns (o); other tokens nothing. The LoRA branch is whole for all tokens.

The products of the branch can be ordered in several ways (RunLoRA, arXiv 2312.03415). All orders give the same numbers
up to rounding except the one that adds ``s·B·A`` to ``W`` first, which rounds the update to the weight's precision and
is taken on request only. :func:`lora_order` counts multiplications and takes the cheapest.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .columns import gather, scatter
from .indexed_linear import indexed_nn, indexed_nt, linear, product_nn, product_nt
from .masters import cast
from .operands import NNOperands, NTOperands
from .operator import held, hold, register, register_with_gradient
from .stored import EncodedWeight, Weight, refuse_trainable, unpack, weight_of

Backward = Literal["through_rank", "through_weight"]


def lora_order(tokens: int, inputs: int, outputs: int, rank: int, *, merge: bool = False) -> tuple[bool, Backward]:
    """The cheapest order by multiply-adds.

        forward     separate        T·r·(in + out)                  (X·Aᵀ)·Bᵀ beside X·Wᵀ
                    merged          in·out·r                        X·(W + s·B·A)ᵀ, only with ``merge``
        backward    through_rank    T·r·(in + out)                  dA = (dY·B)ᵀ·X       dB = dYᵀ·(X·Aᵀ)
                    through_weight  T·in·out + 2·in·out·r           dA = Bᵀ·(dYᵀ·X)      dB = (dYᵀ·X)·Aᵀ

    ``through_rank`` is counted with ``X·Aᵀ`` kept from the forward and ``dY·B`` there for the input gradient, as they
    are unless the weights are merged.

    Returns:
        Whether to merge, and the order of the backward.
    """
    merged = merge and inputs * outputs * rank < tokens * rank * (inputs + outputs)
    through_rank = tokens * rank * (inputs + outputs) * (2 if merged else 1)
    through_weight = tokens * inputs * outputs + 2 * inputs * outputs * rank
    return merged, "through_weight" if through_weight < through_rank else "through_rank"


def _merged(weight: EncodedWeight, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> EncodedWeight:
    """``W + s·B·A`` in the dtype of ``a``, laid out as ``W`` is."""
    first, second = (a.t(), b.t()) if transposed else (b, a)
    return EncodedWeight((torch.addmm(weight.decode(None, a.dtype), first, second, alpha=scaling),))


def scaled_product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """``s · x · y`` in one launch."""
    return x.new_empty(x.shape[0], y.shape[1]).addmm_(x, y, beta=0, alpha=scaling)


def _order(x: Tensor, weight: EncodedWeight, a: Tensor, b: Tensor, sparse: bool, merge: bool) -> tuple[bool, Backward]:
    return lora_order(x.shape[0], a.shape[1], b.shape[0], a.shape[0], merge=merge and not sparse)


def forward(
    x: Tensor,
    parts: list[Tensor],
    layout: list[int],
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: Tensor | None,
    transposed: bool,
    merge: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` (T, out) and ``x·Aᵀ`` (T, r), empty where the backward does not read it."""
    weight = weight_of(parts, layout)
    low = x.new_empty(0)
    merged = False
    if a is not None and b is not None:
        a, b = cast((a, b), x.dtype)
        merged, backward = _order(x, weight, a, b, context_rows is not None, merge)
        if not merged:
            low = linear(x, a)
    product = product_nn if transposed else product_nt
    if merged:
        assert a is not None and b is not None
        return product(x, _merged(weight, a, b, scaling, transposed), bias=bias), low
    if dense_rows is None or context_rows is None or channels is None:
        y = product(x, weight, bias=bias)
        if b is not None:
            y.addmm_(low, b.t(), alpha=scaling)
    else:
        out = weight.length if transposed else weight.channels
        y = (
            x.new_zeros(x.shape[0], out)
            if b is None
            else x.new_empty(x.shape[0], out).addmm_(low, b.t(), beta=0, alpha=scaling)
        )
        some_dense = dense_rows.numel() > 0
        weight = weight.once(some_dense, x.dtype)
        if some_dense:
            # Added to the branch, which is there for all tokens.
            y.index_add_(0, dense_rows, product(x.index_select(0, dense_rows), weight, bias=bias))
        adds = b is not None
        if transposed:
            kept = gather(x, context_rows, channels)
            indexed_nn(NNOperands(kept, context_rows, channels, y, bias=bias, accumulate=adds), weight)
        else:
            kept = indexed_nt(NTOperands(x, context_rows, channels, bias), weight)
            scatter(kept, context_rows, channels, y, accumulate=adds)
    if a is not None and b is not None and backward == "through_weight":
        low = x.new_empty(0)
    return y, low


def _forward_fake(x: Tensor, parts: list[Tensor], layout: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
    _, a, b, _, _, context_rows, _, transposed, merge = rest
    weight = weight_of(parts, layout)
    out = weight.length if transposed else weight.channels
    kept = False
    if a is not None:
        merged, backward = _order(x, weight, a, b, context_rows is not None, merge)
        kept = not merged and backward == "through_rank"
    return x.new_empty(x.shape[0], out), x.new_empty(x.shape[0], a.shape[0]) if kept else x.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor | None,
    low: Tensor,
    parts: list[Tensor],
    layout: list[int],
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    dense_rows: Tensor | None,
    context_rows: Tensor | None,
    channels: Tensor | None,
    transposed: bool,
    merge: bool,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``a`` and ``b``; empty where there is none."""
    weight = weight_of(parts, layout)
    # Results of a registered operator must not share memory: an empty tensor for each.
    none, grad_a, grad_b = (grad.new_empty(0) for _ in range(3))
    z, trained = none, x is not None
    dtypes = [factor.dtype if factor is not None else grad.dtype for factor in (a, b)]
    sparse = dense_rows is not None and context_rows is not None and channels is not None
    merged = False
    if a is not None and b is not None:
        a, b = cast((a, b), grad.dtype)
        merged, order = _order(grad, weight, a, b, sparse, merge)
        if not merged or (trained and order == "through_rank"):
            z = scaled_product(grad, b, scaling)
    if a is not None and b is not None and x is not None:
        if order == "through_rank":
            grad_a = torch.mm(z.t(), x)
            grad_b = scaled_product(grad.t(), linear(x, a) if merged else low, scaling)
        else:
            update = scaled_product(grad.t(), x, scaling)
            grad_a, grad_b = torch.mm(b.t(), update), torch.mm(update, a.t())
        grad_a, grad_b = grad_a.to(dtypes[0]), grad_b.to(dtypes[1])
    if not needs_input:
        return none, grad_a, grad_b
    product = product_nt if transposed else product_nn
    if merged:
        assert a is not None and b is not None
        return product(grad, _merged(weight, a, b, scaling, transposed)), grad_a, grad_b
    if not sparse:
        grad_x = product(grad, weight)
        if a is not None:
            grad_x.addmm_(z, a)
        return grad_x, grad_a, grad_b
    assert dense_rows is not None and context_rows is not None and channels is not None
    width = weight.channels if transposed else weight.length
    grad_x = grad.new_zeros(grad.shape[0], width) if a is None else torch.mm(z, a)
    some_dense = dense_rows.numel() > 0
    weight = weight.once(some_dense, grad.dtype)
    if some_dense:
        grad_x.index_add_(0, dense_rows, product(grad.index_select(0, dense_rows), weight))
    adds = a is not None
    if transposed:
        kept = indexed_nt(NTOperands(grad, context_rows, channels), weight)
        scatter(kept, context_rows, channels, grad_x, accumulate=adds)
    else:
        kept = gather(grad, context_rows, channels)
        indexed_nn(NNOperands(kept, context_rows, channels, grad_x, accumulate=adds), weight)
    return grad_x, grad_a, grad_b


def _backward_fake(
    grad: Tensor, x: Tensor | None, low: Tensor, parts: list[Tensor], layout: list[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, transposed, needs_input = rest[0], rest[1], rest[-3], rest[-1]
    weight = weight_of(parts, layout)
    width = weight.channels if transposed else weight.length
    return (
        grad.new_empty(grad.shape[0], width) if needs_input else grad.new_empty(0),
        grad.new_empty(0) if a is None or x is None else torch.empty_like(a),
        grad.new_empty(0) if b is None or x is None else torch.empty_like(b),
    )


_run_backward = register("lora_linear_backward", backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, parts, layout, _, a, b, *rest = inputs
    ctx.set_materialize_grads(False)
    # The input is read by the branch's gradient only: without a trained branch no activation is kept.
    trained = a is not None and any(ctx.needs_input_grad[4:6])
    ctx.save_for_backward(x if trained else None, output[1], a, b)
    hold(ctx, "parts", parts)
    hold(ctx, "lists", rest[1:4])
    ctx.layout, ctx.scaling, ctx.transposed, ctx.merge = layout, rest[0], rest[4], rest[5]


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    none: list[Any] = [None] * 12
    x, low, a, b = ctx.saved_tensors
    parts = held(ctx, "parts")
    dense_rows, context_rows, channels = held(ctx, "lists")
    none[1] = [None] * len(parts)  # The structure of the inputs is asked for.
    if grad is None:
        return tuple(none)
    grad_x, grad_a, grad_b = _run_backward(
        grad.contiguous(),
        x,
        low,
        parts,
        ctx.layout,
        a,
        b,
        ctx.scaling,
        dense_rows,
        context_rows,
        channels,
        ctx.transposed,
        ctx.merge,
        ctx.needs_input_grad[0],
    )
    none[0] = grad_x if ctx.needs_input_grad[0] else None
    none[4], none[5] = (None, None) if x is None else (grad_a, grad_b)
    return tuple(none)


_run = register_with_gradient("lora_linear", forward, _forward_fake, keep=_keep, gradients=_gradients)


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dense_rows: Tensor | None = None,
    context_rows: Tensor | None = None,
    channels: Tensor | None = None,
    transposed: bool = False,
    merge: bool = False,
) -> Tensor:
    """A frozen linear with its LoRA branch; exact gradients for ``x``, ``a`` and ``b``.

    Args:
        x: (T, in); any T, zero included.
        weight: (out, in), or (in, out) when transposed: the channel is dim 0. Frozen; decoded to ``x.dtype``.
        bias: (out,), frozen.
        a, b: (r, in) and (out, r), cast to ``x.dtype``; both or neither.
        scaling: of the branch.
        dense_rows, context_rows, channels: all three, or none for all tokens whole. Disjoint int64 rows of ``x``, and
            the (k,) ascending int64 rows of ``weight`` that context tokens take. Rows in neither list get the LoRA
            branch alone.
        transposed: the stored matrix is (in, out), its channels are inputs.
        merge: let :func:`lora_order` add the update to the weight first where that is cheaper (rounds the update).

    Returns:
        (T, out) in ``x.dtype``.

    Raises:
        ValueError: ``weight`` or ``bias`` is trainable; a list or a factor is missing.
    """
    stored = unpack(weight)
    refuse_trainable("lora_linear", stored, bias)
    if len({a is None, b is None}) > 1 or len({dense_rows is None, context_rows is None, channels is None}) > 1:
        raise ValueError("lora_linear takes both of a and b or neither, and all three index lists or none")
    return _run(
        x,
        list(stored.parts),
        list(stored.layout),
        bias,
        a,
        b,
        scaling,
        dense_rows,
        context_rows,
        channels,
        transposed,
        merge,
    )[0]
