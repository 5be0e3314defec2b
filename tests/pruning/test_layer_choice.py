"""LoSA's choices: the layers' shares against every vertex of the linear programme, their ranks, the rounds."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from sparselora_dist.pruning.layer_rank import layer_ranks, mean_rank
from sparselora_dist.pruning.layer_share import importance, layer_shares, leeway, round_sparsity
from sparselora_dist.pruning.round_run import parts_of_run


def best_vertex(worth: list[float], mean: float, delta: float, weights: list[int]) -> float:
    """The least Σ w·s·p: at a vertex all layers but one are at a bound, and that one makes the mean."""
    count, best = len(worth), math.inf
    for free in range(count):
        others = [layer for layer in range(count) if layer != free]
        for ends in itertools.product((mean - delta, mean + delta), repeat=count - 1):
            shares = dict(zip(others, ends))
            shares[free] = (mean * sum(weights) - sum(weights[i] * shares[i] for i in others)) / weights[free]
            if mean - delta - 1e-12 <= shares[free] <= mean + delta + 1e-12:
                best = min(best, sum(weights[i] * shares[i] * worth[i] for i in range(count)))
    return best


@pytest.mark.parametrize("weights", [[7] * 6, [3, 9, 4, 4, 8, 2], [5] * 5])
def test_shares_are_the_optimum_of_the_linear_programme(weights: list[int]) -> None:
    generator = random.Random(len(weights) * weights[0])
    for mean, delta in ((0.244, 0.01), (0.55, 0.02), (0.7, 0.03)):
        worth = [generator.uniform(0.5, 1.0) for _ in weights]
        shares = layer_shares(worth, mean, delta, weights)
        assert all(mean - delta - 1e-12 <= share <= mean + delta + 1e-12 for share in shares)
        assert sum(w * s for w, s in zip(weights, shares)) == pytest.approx(mean * sum(weights), abs=1e-12)
        found = sum(w * s * p for w, s, p in zip(weights, shares, worth))
        assert found == pytest.approx(best_vertex(worth, mean, delta, weights), abs=1e-9)


def test_layers_like_the_others_take_more() -> None:
    alike = [1.0, 3.0, 2.0, 4.0]
    for beta in (1.0, 100.0):
        worth = importance(alike, beta)
        assert worth == pytest.approx([math.exp(-beta * c / 10) for c in alike])
        assert layer_shares(worth, 0.5, 0.01, [1] * 4) == pytest.approx([0.49, 0.51, 0.49, 0.51])
    # A tenth of the way to nothing there is no more room.
    assert layer_shares(worth, 0.005, 0.01, [1] * 4) == pytest.approx([0.0, 0.01, 0.0, 0.01])


@pytest.mark.parametrize("mean", [1, 6, 7.3, 10, 16])
def test_ranks_have_the_sum_that_was_asked_for(mean: float) -> None:
    generator = random.Random(0)
    for errors in (
        [generator.expovariate(1) for _ in range(32)],
        [0.0] * 32,
        [1e-9] * 31 + [1.0],
        [1.0] * 31 + [0.0],
    ):
        ranks = layer_ranks(errors, mean)
        assert sum(ranks) == round(mean * 32) and min(ranks) >= 1 and max(ranks) <= 16
        # Who has the larger error never has the smaller rank, but for who was given one of the rest.
        order = sorted(range(32), key=lambda layer: errors[layer])
        assert all(ranks[low] <= ranks[high] + 1 for low, high in itertools.pairwise(order))


def test_a_rank_is_a_layer_s_share_of_the_errors() -> None:
    assert layer_ranks([1.0, 2.0, 3.0, 4.0], 5) == [2, 4, 6, 8]
    assert layer_ranks([1.0, 1.0, 1.0, 97.0], 6) == [2, 3, 3, 16], "more than 16 goes to the others, the worst first"


def test_rounds() -> None:
    """The schedule, the mean ranks and the leeway are the paper's; the parts of the run are all of it."""
    assert [round(round_sparsity(0.5, t, 5), 4) for t in range(1, 6)] == [0.244, 0.392, 0.468, 0.496, 0.5]
    assert [mean_rank(6, 10, t, 5) for t in range(1, 6)] == [6, 7, 8, 9, 10] and mean_rank(6, 10, 1, 1) == 10
    assert [leeway(s) for s in (0.3, 0.5, 0.55, 0.6, 0.7)] == [0.01, 0.01, 0.02, 0.02, 0.03]
    parts = parts_of_run(5, 0.6)
    assert [round(last - first, 6) for first, last in parts] == [0.1, 0.1, 0.1, 0.1, 0.6]
    assert [first for first, _ in parts[1:]] == [last for _, last in parts[:-1]] and parts[-1][1] == 1
    assert parts_of_run(1, 0.6) == [(0.0, 1.0)]
