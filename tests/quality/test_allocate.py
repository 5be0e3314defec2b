"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from sparselora_dist.quality.allocate import Option, allocate


def brute_force(sites: list[list[Option]], need: float) -> float | None:
    """The least loss of all choices that save enough."""
    best = None
    for choice in itertools.product(*([(0.0, 0.0), *options] for options in sites)):
        saving, loss = map(sum, zip(*choice))
        if saving >= need * (1 - 1e-9) and (best is None or loss < best):
            best = loss
    return best


def instance(generator: random.Random, sites: int, options: int, kind: str) -> list[list[Option]]:
    """Random losses; the savings random too, or equal at all sites as those of a real model's layers are."""
    shared = sorted(generator.uniform(0.1, 3) for _ in range(options))
    made = []
    for _ in range(sites):
        losses = [generator.uniform(-0.2 if kind == "noisy" else 0, 1) for _ in range(options)]
        savings = shared if kind == "shared" else [generator.uniform(0.1, 3) for _ in range(options)]
        if kind == "integer":
            losses, savings = [float(round(4 * x)) for x in losses], [float(round(2 * x)) for x in savings]
        made.append(list(zip(savings, losses)))
    return made


@pytest.mark.parametrize("kind", ["shared", "random", "noisy", "integer"])
@pytest.mark.parametrize("seed", range(15))
def test_the_least_loss_of_all_choices(kind: str, seed: int) -> None:
    generator = random.Random(seed)
    sites = instance(generator, generator.randint(1, 6), generator.randint(1, 3), kind)
    most = sum(max(saving for saving, _ in options) for options in sites)
    for share in (0.0, 0.1, 0.35, 0.6, 0.85, 0.99, 1.0):
        found = allocate(sites, most * share)
        assert found.exact
        assert found.saving >= most * share * (1 - 1e-8)
        picked = [([(0.0, 0.0), *options])[number] for number, options in zip(found.choice, sites)]
        assert found.loss == pytest.approx(sum(loss for _, loss in picked), abs=1e-9)
        assert found.saving == pytest.approx(sum(saving for saving, _ in picked), abs=1e-9)
        best = brute_force(sites, most * share)
        if kind == "integer" and share == 0.0:
            continue  # An option that saves nothing is never chosen, whatever it gains.
        assert found.loss == pytest.approx(best, abs=1e-8)


def test_saving_more_never_costs_less() -> None:
    sites = instance(random.Random(1), 30, 5, "shared")
    most = sum(max(saving for saving, _ in options) for options in sites)
    losses = [allocate(sites, most * share / 40).loss for share in range(41)]
    assert losses == sorted(losses)


def test_a_large_model_is_a_matter_of_seconds() -> None:
    """80 layers of three groups, six levels, losses that rise with the level as measured ones do, with noise."""
    generator = random.Random(0)
    savings = {"ffn": 8.0, "qk": 1.1, "vo": 1.0}
    sites = []
    for layer, group in itertools.product(range(80), savings):
        scale = generator.uniform(0.2, 2) * (1 + 20 / (layer + 1))
        levels = (0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
        sites.append([(savings[group] * s, scale * s**3 + generator.gauss(0, 0.02)) for s in levels])
    started = time.perf_counter()
    for share in (0.2, 0.5, 0.8):
        assert allocate(sites, share * 80 * sum(savings.values()) * 0.99).exact
    assert time.perf_counter() - started < 20


def test_what_cannot_be_saved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"save 3 at most, 4 is needed"):
        allocate([[(1.0, 0.1), (2.0, 0.5)], [(1.0, 0.2)]], 4.0)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        allocate([[(1.0, float("nan"))]], 0.5)


def test_nothing_is_needed_nothing_is_chosen() -> None:
    assert allocate([[(1.0, 0.1)], [(1.0, 0.2)]], 0.0).choice == (0, 0)
    assert allocate([], 0.0).choice == ()
