"""Packed steps are padded steps: the same losses, gradients, masks and evaluation, under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.harness import run_ranks
from support.packing_workers import CASES, STEPS, all_cases

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return all_cases("single")


@pytest.fixture(scope="module", params=["zero3", "fsdp2"])
def sharded(request: pytest.FixtureRequest) -> Results:
    return run_ranks("support.packing_workers:all_cases", 2, request.param)


def assert_same_steps(expected: dict[str, Any], got: dict[str, Any], masks: bool) -> None:
    torch.testing.assert_close(torch.tensor(got["loss"]), torch.tensor(expected["loss"]), rtol=1e-6, atol=0)
    for kind in ("gradients", "parameters"):
        assert expected[kind].keys() == got[kind].keys()
        for name, value in expected[kind].items():
            bound = 1e-5 * float(value.abs().max())
            torch.testing.assert_close(got[kind][name], value, rtol=1e-5, atol=bound, msg=f"{kind} of {name}")
    if masks:
        assert_same_masks(expected["masks"], got["masks"])


def assert_same_masks(expected: Any, got: Any) -> None:
    assert len(expected) == len(got) == STEPS
    for one, other in zip(expected, got):
        assert len(one) == len(other)
        for chosen, again in zip(one, other):
            assert chosen.keys() == again.keys()
            assert chosen
            for layer, groups in chosen.items():
                assert all(torch.equal(channels, again[layer][group]) for group, channels in groups.items())


def test_all_rows_in_one_micro_batch_are_the_padded_step(single: dict[str, Any]) -> None:
    assert single["packed, sparse"]["micro-batches"] == [1] * STEPS
    assert_same_steps(single["padded, sparse"], single["packed, sparse"], masks=True)


def test_dense_steps_do_not_depend_on_the_micro_batches(single: dict[str, Any]) -> None:
    assert single["padded, dense"]["micro-batches"] == [2] * STEPS
    assert min(single["packed, dense"]["micro-batches"]) >= 2 and max(single["packed, dense"]["micro-batches"]) > 2
    assert_same_steps(single["padded, dense"], single["packed, dense"], masks=False)


@pytest.mark.parametrize("label", CASES)
def test_engines_agree(single: dict[str, Any], sharded: Results, label: str) -> None:
    """At the same budget over all ranks, however many micro-batches a step takes."""
    for rank in sharded:
        assert rank[label]["micro-batches"] == single[label]["micro-batches"]
        assert_same_steps(single[label], rank[label], masks="sparse" in label)


@pytest.mark.parametrize("label", CASES)
def test_evaluation(single: dict[str, Any], sharded: Results, label: str) -> None:
    """Of the model as trained: padded and packed, at any number of ranks."""
    expected = single[label]["evaluation"]
    for rank in sharded:
        got = rank[label]["evaluation"]
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert (got.token_accuracy, got.exact_match) == (expected.token_accuracy, expected.exact_match)
    if label.startswith("packed, "):
        padded = single[label.replace("packed", "padded")]["evaluation"]
        assert expected.loss == pytest.approx(padded.loss, rel=1e-5)
        assert (expected.token_accuracy, expected.exact_match) == (padded.token_accuracy, padded.exact_match)
