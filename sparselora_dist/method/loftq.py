"""LoftQ (arXiv 2310.08659): an adapter that starts at what storing a matrix in few bits takes away.

    Q_t = stored(W − B'_{t-1} A'_{t-1}),   B'_t A'_t = the best of rank r of W − Q_t,   B'_0 A'_0 = 0

After the last round training has ``Q_T`` under ``A = A'_T / √s``, ``B = B'_T / √s``: the factors carry the adapter's scaling
``s`` already. What was subtracted before ``Q_T`` was stored, the factors of the round before, is the *shift*; after a single
round there is none, and ``Q_1`` is the matrix as it would be stored anyway.

Where the inputs are known, "best" is of the outputs: in the norm of their second moments ``H``. What storing with
compensation takes away cancels over the inputs, so that its largest directions are not those that are seen. With one round
that is the start of CLoQ (arXiv 2501.18475).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

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
    weight: Tensor,
    stored: Callable[[Tensor], Tensor],
    rank: int,
    scaling: float,
    rounds: int,
    *,
    seed: int = 0,
    upper: Tensor | None = None,
) -> Iterator[tuple[Pair | None, Pair]]:
    """After each round, the shift and the adapter's start.

    Args:
        weight: (out, in), any floating dtype. What storing takes is decomposed in fp64 (see :func:`low_rank_factors`: a
            full SVD up to a smaller side of 1024, a randomised one above): the last bits of an SVD depend on where its
            operands lie in memory, and in fp32 they would decide what is stored.
        stored: what a matrix of that shape becomes by being stored; any floating dtype.
        rank: of the adapter. Directions that the matrix does not have are zero.
        scaling: what the adapter's ``B·A`` is multiplied by.
        rounds: at least 1.
        seed: of the randomised SVD.
        upper: U (in, in), upper triangular, with ``UᵀU = H⁻¹`` of the inputs; ``None`` where nothing is known of them.
    """
    weight = weight.detach().float()
    shift: Pair | None = None
    root = math.sqrt(scaling)
    for _ in range(rounds):
        left = (weight - stored(less(weight, *shift) if shift else weight).float()).double()
        a, b = (factor.float() for factor in _best(left, rank, seed, upper))
        missing = rank - a.shape[0]
        pair = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        yield shift, (pair[0] / root, pair[1] / root)
        shift = pair


def _best(left: Tensor, rank: int, seed: int, upper: Tensor | None) -> Pair:
    """Of ``left`` (out, in) fp64; ``A`` and ``B`` of one size, fp64."""
    if upper is None:
        return low_rank_factors(left, rank, seed=seed)
    seen = torch.linalg.solve_triangular(upper.double(), left, upper=True, left=False)
    a, b = low_rank_factors(left, rank, seed=seed, seen=seen)  # b is orthonormal, a all the rest.
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    root = s.sqrt()
    return root[:, None] * vt, b @ (u * root)
