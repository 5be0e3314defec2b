"""How large an adapter each layer takes (LoSA): as its share of what pruning broke.

r_i = clip(round(e_i / Σe · r̄·L), 1, 16), and then one more or one less until their sum is r̄·L
"""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST, LARGEST = 1, 16


def layer_ranks(errors: Sequence[float], mean: float) -> list[int]:
    """The rank of each layer. Their sum is ``round(mean · L)`` exactly.

    What is too much goes from the layers with the smallest errors, what is missing to those with the largest, one each in
    a pass. (The paper's code makes one pass, so that its sum may differ; and slices adapters of rank 8, so that what it
    gives beyond 8 has no effect.)

    Args:
        errors: e_i ≥ 0; where all are 0 the ranks are equal, up to one.
        mean: r̄, between 1 and 16.
    """
    count, whole = len(errors), sum(errors)
    total = round(mean * count)
    shares = [error / whole if whole else 1 / count for error in errors]
    ranks = [min(max(round(share * total), SMALLEST), LARGEST) for share in shares]
    order = sorted(range(count), key=lambda layer: errors[layer])
    while (missing := total - sum(ranks)) != 0:
        step, limit = (1, LARGEST) if missing > 0 else (-1, SMALLEST)
        open_ = [layer for layer in (order[::-1] if missing > 0 else order) if ranks[layer] != limit]
        for layer in open_[: abs(missing)]:
            ranks[layer] += step
    return ranks


def mean_rank(first: float, last: float, number: int, rounds: int) -> float:
    """r̄ of round 1 … T, in equal steps: 6, 7, 8, 9, 10 of five."""
    return last if rounds == 1 else first + (last - first) * (number - 1) / (rounds - 1)
