"""Trained factors beside products in a narrower dtype: fp32 masters of an adapter under autocast.

An operation casts the factors that it reads, several in one launch, and hands back gradients in the masters' dtype. Cast one
by one outside, each would be an operation of the graph with a gradient of its own, which is host time at short sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cast(masters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The masters in ``dtype``: themselves where they have it, else views of one buffer."""
    if all(master.dtype == dtype for master in masters):
        return list(masters)
    sizes = [master.numel() for master in masters]
    buffer = masters[0].new_empty(sum(sizes), dtype=dtype)
    parts = [part.view(master.shape) for part, master in zip(buffer.split(sizes), masters)]
    _copy(parts, masters)
    return parts


def stack(masters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Masters (r_i, in) one below the other in ``dtype``: (Σ r_i, in)."""
    if all(master.dtype == dtype for master in masters):
        return torch.cat(list(masters))
    rows = [master.shape[0] for master in masters]
    whole = masters[0].new_empty(sum(rows), masters[0].shape[1], dtype=dtype)
    _copy(whole.split(rows), masters)
    return whole


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(targets), list(sources))
