"""Reference of ``kernels/expert_score.py``: pair by pair, expert by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grouped import owner


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
        e = owner(s, ends)
        both = [b.chunk(experts)[e] @ (a.chunk(experts)[e] @ x[s]) for a, b in (gate, up)]
        if biases is not None:
            both = [one + bias.chunk(experts)[e] for one, bias in zip(both, biases)]
        scores[e] = scores[e] + (weights[s] * combine(both[0], both[1])) ** 2
    return torch.cat(scores)
