"""Copies of chosen columns of chosen rows: the formulas, and what runs without Triton."""

from __future__ import annotations

from torch import Tensor


def gather(x: Tensor, rows: Tensor, channels: Tensor) -> Tensor:
    """``x[rows][:, channels]``: (n, k)."""
    return x.index_select(0, rows).index_select(1, channels)


def scatter(y: Tensor, rows: Tensor, channels: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """``out[rows[:, None], channels] (+)= y``, in place."""
    at_rows = out.index_select(0, rows)
    at_rows = at_rows.index_add_(1, channels, y) if accumulate else at_rows.index_copy_(1, channels, y)
    return out.index_copy_(0, rows, at_rows)
