"""Tokens to the experts that a router chose for them, and back.

Every token has K (token, expert) pairs. They are put in the order of their experts, so that each expert's pairs are a run
of rows, and where the runs end stays on the device: nothing waits for it. Both ways are gathers, whose gradients are
gathers too: repeated runs agree to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operator import held, hold


class Pairs(NamedTuple):
    """The S = n·K pairs of n tokens."""

    rows: Tensor
    """(n,) int64 rows of ``x``, each at most once."""
    order: Tensor
    """(S,) int64: pair ``token · K + slot`` of each place, ascending by expert, and by token within one."""
    places: Tensor
    """(S,) int64, its inverse: the place of each pair."""
    experts: Tensor
    """(S,) int64: the expert of each place."""
    ends: Tensor
    """(E,) int32: where each expert's run of places ends."""

    @property
    def slots(self) -> int:
        """K."""
        return self.order.shape[0] // max(self.rows.shape[0], 1)


def expert_pairs(chosen: Tensor, rows: Tensor, experts: int) -> Pairs:
    """The pairs of some tokens.

    Args:
        chosen: (T, K) integers in [0, ``experts``), the experts of every token.
        rows: (n,) int64, the tokens.
        experts: how many there are.
    """
    flat = chosen.index_select(0, rows).flatten().long()
    found, order = torch.sort(flat, stable=True)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
    ends = torch.searchsorted(found, torch.arange(experts, device=found.device), right=True, out_int32=True)
    return Pairs(rows, order, places, found, ends)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs) -> Tensor:
        hold(ctx, "lists", (pairs.rows, pairs.places))
        ctx.tokens, ctx.slots = x.shape[0], pairs.slots
        return _copied(x, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, places = held(ctx, "lists")
        return grad.new_zeros(ctx.tokens, grad.shape[1]).index_copy_(0, rows, _summed(grad, places, ctx.slots)), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pairs: Pairs) -> Tensor:
        # Held, and not saved: checkpointing would run the last product of a layer again to have it.
        hold(ctx, "lists", (pairs.order,))
        ctx.slots = pairs.slots
        return _summed(y, pairs.places, pairs.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, held(ctx, "lists")[0] // max(ctx.slots, 1)), None


def _copied(x: Tensor, pairs: Pairs) -> Tensor:
    return x.index_select(0, pairs.rows.index_select(0, pairs.order // max(pairs.slots, 1)))


def _summed(y: Tensor, places: Tensor, slots: int) -> Tensor:
    return y.index_select(0, places).view(-1, max(slots, 1), y.shape[1]).sum(1)


def spread(x: Tensor, pairs: Pairs) -> Tensor:
    """``x`` (T, H) -> (S, H), each place's token."""
    return _Spread.apply(x, pairs)


def collect(y: Tensor, pairs: Pairs) -> Tensor:
    """(S, H) -> (n, H), the sum over each token's places."""
    return _Collect.apply(y, pairs)
