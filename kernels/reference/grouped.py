"""Reference of ``kernels/grouped.py`` and ``kernels/expert_score.py``: row by row, expert by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _owner(row: int, ends: Tensor) -> int:
    return next(expert for expert, end in enumerate(ends.tolist()) if row < end)


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, channels: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """See :func:`sparselora_kernels.grouped_linear`."""
    rows = weight if channels is None else weight[channels]
    own = rows.chunk(len(ends))
    found = [x[s] @ (own[_owner(s, ends)] if transposed else own[_owner(s, ends)].t()) for s in range(len(x))]
    return torch.stack(found) if found else x @ (own[0] if transposed else own[0].t())


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.grouped_product`."""
    return grouped_linear(x, weight.flatten(0, 1), ends)


def expert_score(
    x: Tensor,
    ends: Tensor,
    weights: Tensor,
    gate: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.expert_score`."""
    experts = len(ends)
    scores = [torch.zeros(gate[1].shape[0] // experts, dtype=x.dtype) for _ in range(experts)]
    for s in range(len(x)):
        e = _owner(s, ends)
        both = [b.chunk(experts)[e] @ (a.chunk(experts)[e] @ x[s]) for a, b in (gate, up)]
        if biases is not None:
            both = [one + bias.chunk(experts)[e] for one, bias in zip(both, biases)]
        scores[e] = scores[e] + (weights[s] * combine(both[0], both[1])) ** 2
    return torch.cat(scores)
