"""Packing: every row once, within the budget, in few micro-batches, the same ones for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora_dist.data import TokenDataset, collate_packed, pack, packed_eval_batches

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None, database=None)
@given(lengths=LENGTHS, per_rank=st.integers(60, 150), world=st.integers(1, 4), quadratic=st.sampled_from([0.0, 0.1]))
def test_which_rows_meet_depends_on_the_budget_over_all_ranks_alone(
    lengths: list[int], per_rank: int, world: int, quadratic: float
) -> None:
    sizes = np.asarray(lengths)
    rows = np.random.RandomState(0).permutation(sizes.size)
    many = pack(rows, sizes, per_rank, world, quadratic)
    one = pack(rows, sizes, per_rank * world, 1, quadratic)
    together = [sorted(row for rank in part for row in rank) for part in many.parts]
    assert together == [sorted(part[0]) for part in one.parts]
    assert sorted(many.indices.tolist()) == list(range(sizes.size))
    assert {len(part) for part in many.parts} == {world}
    for part in many.parts:
        tokens = [int(np.maximum(sizes[list(rank)], 1).sum()) if rank else 0 for rank in part]
        assert sum(tokens) <= per_rank * world
        assert max(tokens) < per_rank + max(1, *lengths)


def fewest(sizes: list[int], budget: int) -> int:
    """By trying all: (micro-batches, tokens in the last) of every set of rows, the smaller the better."""
    best = {0: (1, 0)}
    for rows in range(1, 2 ** len(sizes)):
        options = []
        for row, size in enumerate(sizes):
            if rows >> row & 1:
                number, filled = best[rows & ~(1 << row)]
                options.append((number, filled + size) if filled + size <= budget else (number + 1, size))
        best[rows] = min(options)
    return best[2 ** len(sizes) - 1][0]


@settings(max_examples=60, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9), budget=st.integers(60, 150))
def test_few_micro_batches(lengths: list[int], budget: int) -> None:
    """Never more than best-fit decreasing promises, 11/9 of the fewest and 2/3; one where all rows fit into one."""
    parts = pack(np.arange(len(lengths)), np.asarray(lengths), budget, 1).parts
    assert len(parts) <= 11 / 9 * fewest(lengths, budget) + 2 / 3
    assert (len(parts) == 1) == (sum(lengths) <= budget)


def test_ranks_have_the_same_work() -> None:
    """By tokens, and by tokens squared where attention dominates: then a long row weighs more than many short ones."""
    sizes = np.asarray([100] + [10] * 30)
    by_tokens = pack(np.arange(31), sizes, 400, 2).parts[0]
    assert [int(sizes[list(rank)].sum()) for rank in by_tokens] == [200, 200]
    by_square = pack(np.arange(31), sizes, 400, 2, quadratic=10.0).parts[0]
    assert sorted(map(len, by_square)) == [1, 30]


def test_micro_batches_are_even() -> None:
    """Not full ones and a small rest: masks are chosen over as many tokens in each."""
    sizes = np.full(9, 10)
    assert [len(part[0]) for part in pack(np.arange(9), sizes, 40, 1).parts] == [3, 3, 3]


def test_a_longer_row_has_a_micro_batch_to_itself() -> None:
    assert pack([0, 1, 2], np.asarray([5, 90, 5]), 50, 1).parts == (((1,),), ((0, 2),))


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1, got"):
        pack([0], np.asarray([1]), *numbers)


@settings(max_examples=60, deadline=None, database=None)
@given(lengths=LENGTHS, budget=st.integers(60, 150), world=st.integers(1, 3))
def test_evaluation_sees_every_row_once(lengths: list[int], budget: int, world: int) -> None:
    sizes = np.asarray(lengths)
    ranks = [packed_eval_batches(sizes, budget, world, rank) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(sizes.size))
    for batches in zip(*ranks):
        assert sum(int(np.maximum(sizes[batch], 1).sum()) for batch in map(list, batches)) <= budget * world


def dataset() -> TokenDataset:
    """Rows of 3, 0 and 2 tokens; trained from the second token of each, and the last row wholly."""
    mask = np.asarray([False, True, True, True, True])
    return TokenDataset("d", np.asarray([11, 12, 13, 21, 22]), mask, np.asarray([0, 3, 3, 5]))


def test_rows_in_a_line() -> None:
    batch = collate_packed(dataset(), [2, 0], pad_token_id=9)
    assert {name: t.tolist() for name, t in batch.items()} == {
        "input_ids": [[21, 22, 11, 12, 13]],
        "position_ids": [[0, 1, 0, 1, 2]],
        "labels": [[-100, 22, -100, 12, 13]],  # Nothing predicts a row's first token.
        "real": [[1, 1, 1, 1, 1]],
        "lengths": [2, 3],
    }


def test_stand_ins_are_not_real() -> None:
    batch = collate_packed(dataset(), [1, 2], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[9, 21, 22]] and batch["real"].tolist() == [[0, 1, 1]]
    nothing = collate_packed(dataset(), [], pad_token_id=9)
    assert {name: t.tolist() for name, t in nothing.items()} == {
        "input_ids": [[9]],
        "position_ids": [[0]],
        "labels": [[-100]],
        "real": [[0]],
        "lengths": [1],
    }
