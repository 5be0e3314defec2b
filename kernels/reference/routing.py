"""Reference of ``kernels/routing.py``: pairs of tokens and experts as a sorted list."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_pairs(chosen: Tensor, rows: Tensor, experts: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(expert, place among ``rows``, slot) in the order of :func:`sparselora_kernels.expert_pairs`, and its ``ends``."""
    pairs = [(int(e), n, slot) for n, row in enumerate(rows.tolist()) for slot, e in enumerate(chosen[row])]
    pairs.sort()
    return pairs, [sum(e <= expert for e, _, _ in pairs) for expert in range(experts)]


def spread(x: Tensor, chosen: Tensor, rows: Tensor, experts: int) -> Tensor:
    """See :func:`sparselora_kernels.spread`."""
    pairs, _ = expert_pairs(chosen, rows, experts)
    return torch.stack([x[int(rows[n])] for _, n, _ in pairs]) if pairs else x[:0]


def collect(y: Tensor, chosen: Tensor, rows: Tensor, experts: int) -> Tensor:
    """See :func:`sparselora_kernels.collect`."""
    pairs, _ = expert_pairs(chosen, rows, experts)
    found = [
        sum((y[s] for s, pair in enumerate(pairs) if pair[1] == n), y.new_zeros(y.shape[1])) for n in range(len(rows))
    ]
    return torch.stack(found) if found else y[:0]
