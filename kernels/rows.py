"""Splitting tokens into dense and context rows, and joining them again.

    split_rows    X (T, H)                        ->  X[dense], X[context]
    join_rows     Y_dense (D, H), Y_context (C, H) ->  Y (T, H), zero at rows in neither list (padding)

Each is the other's backward, and neither keeps more than the index lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def blank(like: Tensor, tokens: int, width: int, covered: int) -> Tensor:
    """A (tokens, width) tensor to put ``covered`` rows into: zeroed only where some rows stay empty."""
    return like.new_empty(tokens, width) if covered == tokens else like.new_zeros(tokens, width)


def _join(dense: Tensor, context: Tensor, dense_rows: Tensor, context_rows: Tensor, tokens: int) -> Tensor:
    y = blank(dense, tokens, dense.shape[1], dense_rows.numel() + context_rows.numel())
    return y.index_copy_(0, dense_rows, dense).index_copy_(0, context_rows, context)


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, dense_rows: Tensor, context_rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dense_rows, context_rows)
        ctx.tokens = x.shape[0]
        return x.index_select(0, dense_rows), x.index_select(0, context_rows)

    @staticmethod
    def backward(ctx: Any, dense: Tensor, context: Tensor) -> Any:
        dense_rows, context_rows = ctx.saved_tensors
        return _join(dense, context, dense_rows, context_rows, ctx.tokens), None, None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, dense: Tensor, context: Tensor, dense_rows: Tensor, context_rows: Tensor, tokens: int
    ) -> Tensor:
        ctx.save_for_backward(dense_rows, context_rows)
        return _join(dense, context, dense_rows, context_rows, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dense_rows, context_rows = ctx.saved_tensors
        return grad.index_select(0, dense_rows), grad.index_select(0, context_rows), None, None, None


def split_rows(x: Tensor, dense_rows: Tensor, context_rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(x[dense_rows], x[context_rows])`` for ``x`` (T, H) and disjoint int64 row lists; padding is left behind."""
    return _SplitRows.apply(x, dense_rows, context_rows)


def join_rows(dense: Tensor, context: Tensor, dense_rows: Tensor, context_rows: Tensor, tokens: int) -> Tensor:
    """The (tokens, H) tensor with ``dense`` and ``context`` at their rows, zero at the others."""
    return _JoinRows.apply(dense, context, dense_rows, context_rows, tokens)
