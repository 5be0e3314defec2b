"""LoftQ (arXiv 2310.08659): an adapter that starts at what storing a matrix in few bits takes away.

    Q_t = stored(W − B'_{t-1} A'_{t-1}),   B'_t A'_t = the best of rank r of W − Q_t,   B'_0 A'_0 = 0

After the last round training has ``Q_T`` under ``A = A'_T / √s``, ``B = B'_T / √s``: the factors carry the adapter's scaling
``s`` already. What was subtracted before ``Q_T`` was stored, the factors of the round before, is the *shift*; after a single
round there is none, and ``Q_1`` is the matrix as it would be stored anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .estimator import low_rank_factors

Pair = tuple[Tensor, Tensor]
"""``A`` (r, in) and ``B`` (out, r), fp32."""

_CHUNK = 1 << 22
"""Values that are subtracted from at a time."""


def less(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``values − b·a`` in fp32: (n, m), from ``a`` (r, m) and ``b`` (n, r).

    In fp64, rounded once: all ranks must store the same, whichever rows they do it with, and in fp32 the last bit of a
    product depends on the shapes around it.
    """
    result = torch.empty_like(values, dtype=torch.float32)
    a, step = a.double(), max(1, _CHUNK // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        result[rows] = torch.addmm(values[rows].double(), b[rows].double(), a, alpha=-1)
    return result


def alternate(
    weight: Tensor, stored: Callable[[Tensor], Tensor], rank: int, scaling: float, rounds: int, *, seed: int = 0
) -> tuple[Pair | None, Pair]:
    """The shift, and the adapter's start.

    Args:
        weight: (out, in), any floating dtype. What storing takes is decomposed in fp64 (see :func:`low_rank_factors`: a
            full SVD up to a smaller side of 1024, a randomised one above): the last bits of an SVD depend on where its
            operands lie in memory, and in fp32 they would decide what is stored.
        stored: what a matrix of that shape becomes by being stored; any floating dtype.
        rank: of the adapter. Directions that the matrix does not have are zero.
        scaling: what the adapter's ``B·A`` is multiplied by.
        rounds: at least 1.
        seed: of the randomised SVD.
    """
    weight = weight.detach().float()
    shift: Pair | None = None
    pair: Pair | None = None
    for _ in range(rounds):
        shift = pair
        target = less(weight, *shift) if shift else weight
        left = weight - stored(target).float()
        a, b = (factor.float() for factor in low_rank_factors(left.double(), rank, seed=seed))
        missing = rank - a.shape[0]
        pair = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    assert pair is not None
    root = math.sqrt(scaling)
    return shift, (pair[0] / root, pair[1] / root)
