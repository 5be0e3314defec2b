"""A multiple-choice knapsack: one sparsity per site, the least total loss that still saves enough FLOPs.

With savings w and losses c of the options j of each site i (the dense option, w = c = 0, among them):

    minimise Σ_i c[i, j_i]   such that   Σ_i w[i, j_i] >= need

Solved exactly: site by site, keeping the partial choices that no other beats in both saving and loss. A Lagrangian bound
removes those that cannot lead to anything better than a solution already known, so that few remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Option = tuple[float, float]
"""Saving, loss."""

_TOLERANCE = 1e-9  # Of the saving that is needed: sums of floats.
# Partial choices that are kept. Real models stay thousands of times below it.
_MOST_STATES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What is chosen."""

    choice: tuple[int, ...]
    """Per site 0 for dense, or the number of its option, from 1."""
    loss: float
    saving: float
    exact: bool
    """Whether this is proven to be the least loss; false where the search had to be cut short."""


def allocate(sites: Sequence[Sequence[Option]], need: float) -> Allocation:
    """Choose one option, or none, at each site.

    Args:
        sites: (saving, loss) of every option of every site. An option that saves nothing is never chosen.
        need: what the chosen savings must add up to.

    Raises:
        ValueError: all savings together are too small, or a number is not finite.
    """
    if not all(np.isfinite(value) for options in sites for option in options for value in option):
        raise ValueError("a saving or a loss is not finite: nothing can be chosen by it")
    scale = need if need > 0 else 1.0
    width = 1 + max((len(options) for options in sites), default=0)
    # (sites, options), option 0 is dense; what is absent costs infinitely much.
    saving, loss = np.zeros((len(sites), width)), np.full((len(sites), width), np.inf)
    loss[:, 0] = 0.0
    for site, options in enumerate(sites):
        for number, (w, c) in enumerate(options, 1):
            if w > 0:
                saving[site, number], loss[site, number] = w / scale, c
    goal = (1.0 if need > 0 else 0.0) - _TOLERANCE
    most = saving.max(axis=1, initial=0.0).sum()
    if most < goal:
        raise ValueError(f"the options save {most * scale:g} at most, {need:g} is needed")
    price = _price(saving, loss, goal)
    known = _pick(saving, loss, price)
    choice, exact = _search(saving, loss, goal, price, known)
    rows = np.arange(len(sites))
    return Allocation(
        choice=tuple(int(number) for number in choice),
        loss=float(loss[rows, choice].sum()),
        saving=float(saving[rows, choice].sum() * scale),
        exact=exact,
    )


def _pick(saving: np.ndarray, loss: np.ndarray, price: float) -> np.ndarray:
    """Per site the option of least ``loss - price * saving``; of equals the one that saves most."""
    reduced = loss - price * saving
    near = reduced <= reduced.min(axis=1, keepdims=True) + 1e-12 * (1 + price)
    return np.where(near, saving, -1.0).argmax(axis=1)


def _price(saving: np.ndarray, loss: np.ndarray, goal: float) -> float:
    """About the lowest price of a saving at which the sites, each for itself, save enough."""

    def enough(price: float) -> bool:
        return saving[np.arange(len(saving)), _pick(saving, loss, price)].sum() >= goal

    if not len(saving) or enough(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _search(
    saving: np.ndarray, loss: np.ndarray, goal: float, price: float, known: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The best choice, from ``known``, which is feasible; and whether that is proven."""
    count = len(saving)
    best = float(loss[np.arange(count), known].sum())
    slack = 1e-9 * (1.0 + abs(best))
    # What the sites from i on can still save, and the least that they cost at the price.
    still = np.append(saving.max(axis=1, initial=0.0)[::-1].cumsum()[::-1], 0.0)
    cheapest = np.append((loss - price * saving).min(axis=1, initial=np.inf)[::-1].cumsum()[::-1], 0.0)
    saved, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for site in range(count):
        options = np.flatnonzero(np.isfinite(loss[site]))
        parent = np.repeat(np.arange(len(saved)), len(options))
        number = np.tile(options, len(saved))
        saved = np.minimum(saved[parent] + saving[site, number], max(goal, 0.0))
        lost = lost[parent] + loss[site, number]
        bound = lost + price * (goal - saved) + cheapest[site + 1]
        keep = np.flatnonzero((bound <= best + slack) & (saved + still[site + 1] >= goal))
        order = keep[np.lexsort((lost[keep], -saved[keep]))]
        least = np.minimum.accumulate(np.append(np.inf, lost[order]))[:-1]
        order = order[lost[order] < least]
        if len(order) > _MOST_STATES:
            exact = False
            order = order[np.sort(np.argsort(bound[order], kind="stable")[:_MOST_STATES])]
        trail.append((parent[order], number[order]))
        saved, lost = saved[order], lost[order]
    if not len(lost) or lost.min(initial=np.inf) > best:  # Only rounding can bring this about.
        return known, exact
    state = int(lost.argmin())
    choice = np.zeros(count, dtype=np.int64)
    for site in range(count - 1, -1, -1):
        parents, numbers = trail[site]
        choice[site], state = numbers[state], parents[state]
    return choice, exact
