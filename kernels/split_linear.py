"""A frozen product for dense and context tokens at once, so that an encoded weight is decoded once for both.

    transposed=False    Y_d = X_d · Wᵀ + b     Y_c = X_c · W[channels]ᵀ + b[channels]
    transposed=True     Y_d = H_d · W + b      Y_c = H_c · W[channels] + b

The tokens come already split (:func:`sparselora_kernels.split_rows`): between the two products of a gated FFN they stay so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .indexed_linear import frozen, input_gradient, product
from .stored import Decode, EncodedWeight, Weight, unpack, whole_and_kept


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_dense: Tensor,
        x_context: Tensor,
        bias: Tensor | None,
        channels: Tensor,
        transposed: bool,
        decode: Decode,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(channels, *parts)
        ctx.transposed, ctx.decode = transposed, decode
        whole, kept = whole_and_kept(EncodedWeight(parts, decode), x_dense.shape[0] > 0, channels, x_context.dtype)
        kept_bias = bias if bias is None or transposed else bias.index_select(0, channels)
        if x_dense.shape[0]:
            dense = product(x_dense, whole, bias, transposed)
        else:
            dense = x_dense.new_empty(0, kept.shape[1] if transposed else parts[0].shape[0])
        return dense, product(x_context, kept, kept_bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_dense: Tensor, grad_context: Tensor) -> Any:
        channels, *parts = ctx.saved_tensors
        weight = EncodedWeight(tuple(parts), ctx.decode)
        whole, kept = whole_and_kept(weight, grad_dense.shape[0] > 0, channels, grad_context.dtype)
        if grad_dense.shape[0]:
            dense = input_gradient(grad_dense, whole, ctx.transposed)
        else:
            dense = grad_dense.new_empty(0, parts[0].shape[0] if ctx.transposed else kept.shape[1])
        context = input_gradient(grad_context, kept, ctx.transposed)
        return dense, context, None, None, None, None, *(None for _ in parts)


def split_linear(
    x_dense: Tensor,
    x_context: Tensor,
    weight: Weight,
    bias: Tensor | None,
    channels: Tensor,
    *,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The whole product for ``x_dense`` and the kept channels' for ``x_context``; exact input gradients.

    Args:
        x_dense: (D, in), or (D, C) when transposed; D may be zero, then only the kept rows are decoded.
        x_context: (T, in), or (T, k) when transposed. Of the same dtype.
        weight: (C, in), or (C, out) when transposed; frozen.
        bias: (C,), or (out,) when transposed; frozen.
        channels: (k,) sorted int64 rows of ``weight``.

    Returns:
        ``(D, C), (T, k)``, or ``(D, out), (T, out)`` when transposed.

    Raises:
        ValueError: ``weight`` or ``bias`` is trainable.
    """
    parts, decode = unpack(weight)
    frozen("split_linear", parts, bias)
    return _SplitLinear.apply(x_dense, x_context, bias, channels, transposed, decode, *parts)
