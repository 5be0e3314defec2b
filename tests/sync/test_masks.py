"""Mask synchronisation on 2 and 4 ranks: whose tokens choose, how often it is asked, and what happens when it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import sync_workers as workers
from support.compare import assert_close
from support.harness import run_ranks
from support.models import batch
from support.sync_workers import PREDICTED, TIMEOUT, Masks

GROUPS = [(0, "ffn"), (1, "ffn"), (1, "qk"), (1, "vo"), (2, "vo")]
MODES = ("none", "reentrant", "non-reentrant")


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks("support.sync_workers:two_ranks", 2)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks("support.sync_workers:four_ranks", 4)


@pytest.fixture(scope="module")
def alone() -> Any:
    """The same model in this process, which has no ranks."""
    return workers.sparse_model()


def assert_same_masks(expected: Masks, *others: Masks) -> None:
    for number, got in enumerate(others):
        assert sorted((layer, group) for layer in got for group in got[layer]) == GROUPS
        for layer, group in GROUPS:
            assert torch.equal(expected[layer][group], got[layer][group]), (number, layer, group)


# --- whose tokens choose ----------------------------------------------------------------------------------------------


def test_global_is_one_process_on_the_concatenated_batch(two: Any, four: Any, alone: Any) -> None:
    for seed in range(4):
        assert_same_masks(workers.masks(alone, batch(4, 24, seed=seed)), *(rank["global"][seed] for rank in two))
    assert_same_masks(workers.masks(alone, batch(8, 24, seed=7)), *(rank["global"] for rank in four))
    # The batches differ, and so do the masks: the comparison is not one of constants.
    first, second = two[0]["global"][:2]
    assert any(not torch.equal(first[layer][group], second[layer][group]) for layer, group in GROUPS)


def test_node_is_one_process_on_the_nodes_batch(four: Any, alone: Any) -> None:
    inputs = batch(8, 24, seed=7)
    assert [rank["node ranks"] for rank in four] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for node in (0, 1):
        ranks = four[2 * node : 2 * node + 2]
        rows = [row for row in range(8) if row % 4 // 2 == node]
        expected = workers.masks(alone, workers.rows_of(inputs, rows))
        assert_same_masks(expected, *(rank["node"] for rank in ranks))
        assert [rank["node collectives"] for rank in ranks] == [PREDICTED] * 2
    left, right = four[0]["node"], four[2]["node"]
    assert any(not torch.equal(left[layer][group], right[layer][group]) for layer, group in GROUPS)


def test_local_is_this_ranks_tokens_without_communication(two: Any, alone: Any) -> None:
    inputs = batch(4, 24)
    for rank, seen in enumerate(two):
        assert seen["local collectives"] == (0, 0)
        assert_same_masks(workers.masks(alone, workers.rows_of(inputs, [rank, rank + 2])), seen["local"])
    assert any(not torch.equal(two[0]["local"][layer][group], two[1]["local"][layer][group]) for layer, group in GROUPS)


@pytest.mark.parametrize(
    ("name", "inputs", "context"),
    [("no context", workers.lopsided_batch(), 0), ("padding", workers.padded_batch(), 1)],
)
def test_a_rank_with_nothing_to_score_takes_part(two: Any, alone: Any, name: str, inputs: Any, context: int) -> None:
    assert two[1][name]["context"] == context
    assert two[0][name]["context"] > 0
    assert_same_masks(workers.masks(alone, inputs), *(rank[name]["masks"] for rank in two))
    assert all(rank[name]["finite"] for rank in two)
    loss = workers.forward(alone, inputs).item()
    assert sum(rank[name]["loss"] for rank in two) == pytest.approx(loss, rel=1e-5)


def test_ties_break_the_same_way_everywhere(four: Any) -> None:
    for layer, group in GROUPS:
        kept = four[0]["tied"][layer][group]
        assert torch.equal(kept, torch.arange(kept.numel()))
    assert_same_masks(four[0]["tied"], *(rank["tied"] for rank in four))


# --- how often --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_collectives_of_a_step(two: Any, mode: str) -> None:
    for rank in two:
        seen = rank["collectives"][mode]
        # Counted at torch.distributed and by the sync itself; backward, recomputation included, adds none.
        assert seen["forward"] == (PREDICTED, PREDICTED)
        assert seen["whole"] == (PREDICTED, PREDICTED)
        assert seen["own group"]
        assert seen["masks kept in backward"]
        assert seen["two pending"] == 2 * PREDICTED


@pytest.mark.parametrize("mode", MODES[1:])
def test_checkpointing_changes_nothing(two: Any, mode: str) -> None:
    for rank in two:
        plain, seen = rank["collectives"]["none"], rank["collectives"][mode]
        assert_same_masks(plain["masks"], seen["masks"])
        for key in ("gradients", "two pending gradients"):
            assert plain[key].keys() == seen[key].keys()
            for name, gradient in plain[key].items():
                assert_close(f"{key} {name}", gradient, seen[key][name])


def test_dense_steps_and_evaluation_do_not_communicate(two: Any) -> None:
    for rank in two:
        assert rank["collectives"]["evaluation"] == (0, 0)
        assert rank["collectives"]["schedule"] == [0, PREDICTED, PREDICTED, 0]


def test_interval(two: Any) -> None:
    for rank in two:
        for interval in (2, 3):
            expected = [0 if step % interval else PREDICTED for step in range(6)]
            assert rank["collectives"][f"interval {interval}"] == expected
            assert all(rank["collectives"][f"interval {interval} held"])


def test_masks_that_are_shared_are_not_asked_for(two: Any) -> None:
    """A policy and its reference; two forwards of a generation, the micro-batch on it, and one after it."""
    for rank in two:
        assert rank["sharing"]["issued"] == [PREDICTED, 0, PREDICTED, 0, 0, PREDICTED]
    assert_same_masks(*(rank["sharing"]["masks"] for rank in two))


def test_dense_tokens_are_computed_while_the_scores_are_on_their_way(two: Any) -> None:
    for rank in two:
        gate_and_up = ["started", "dense", "dense", "waited", "selected", "context", "context"]
        assert rank["order"] == gate_and_up


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_non_finite_scores_of_one_rank_stop_all(four: Any, kind: str) -> None:
    for rank in four:
        assert rank[kind].startswith("non-finite channel scores at layer 1 ffn on rank 2:"), rank[kind]
        assert rank[f"{kind} context closed"]


@pytest.mark.parametrize(("place", "layer", "kind"), [("input", 1, "attention"), ("post_attention", 1, "ffn")])
def test_one_rank_alone_names_layer_and_rank(place: str, layer: int, kind: str) -> None:
    """Nothing is sent there: the selection itself says so."""
    model = workers.sparse_model()
    norm = getattr(model.get_base_model().model.layers[layer], f"{place}_layernorm").weight.data
    norm[0] = float("nan")
    message = workers.failure(lambda: workers.forward(model, batch(4, 24)))
    assert message.startswith(f"non-finite channel scores at layer {layer} {kind} on rank 0:"), message
    assert workers.sync_of(model).collectives == 0


def test_a_skipped_sync_names_both_ranks_and_layers(four: Any) -> None:
    for number, rank in enumerate(four):
        message = rank["skipped"]
        assert message.startswith("mask synchronisation mismatch"), message
        for part in ("rank 1 is at layer 2 attention", f"rank {0 if number == 1 else number} is at layer 1 ffn"):
            assert part in message, message
    # Nothing was left half done: the next step of all ranks is in order.
    assert_same_masks(four[0]["global"], *(rank["global again"] for rank in four))


def test_a_missing_rank_is_named_within_the_timeout(two: Any, four: Any) -> None:
    for number in (0, 2, 3):
        message = four[number]["missing"]
        assert message.startswith(f"mask synchronisation failed: rank {number} is at layer 0 ffn"), message
        assert "rank 1 did not arrive" in message
        assert all(f"rank {other} is at layer 0 ffn" in message for other in (0, 2, 3))
        assert four[number]["missing seconds"] < TIMEOUT + 5
    message = two[0]["missing at first"]
    assert message == "mask synchronisation failed: rank 0 is at layer 0 ffn; rank 1 did not arrive", message
