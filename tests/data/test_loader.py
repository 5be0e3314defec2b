"""Global batches: each row once, the same for every world size, random access; collation and evaluation batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselora_dist.data import NO_ROW, GlobalBatchSampler, TokenDataset, collate, eval_batches, padding_id


def row_lengths(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(1, 300, size=rows)


def dataset_of(lengths: list[int]) -> TokenDataset:
    """Row i holds the token i + 1, trained from its second token on."""
    offsets = np.cumsum([0, *lengths])
    mask = np.ones(offsets[-1], dtype=bool)
    mask[offsets[:-1][np.asarray(lengths) > 0]] = False
    return TokenDataset("d", np.repeat(np.arange(1, len(lengths) + 1), lengths), mask, offsets)


@settings(max_examples=60, deadline=None, database=None)
@given(
    rows=st.integers(1, 90),
    per_device=st.integers(1, 3),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    grouped=st.booleans(),
)
def test_world_size_changes_nothing(
    rows: int, per_device: int, world: int, accumulation: int, seed: int, grouped: bool
) -> None:
    lengths = row_lengths(rows)
    many = GlobalBatchSampler(lengths, per_device, world, accumulation, seed, grouped)
    one = GlobalBatchSampler(lengths, per_device * world, 1, accumulation, seed, grouped)
    flat = GlobalBatchSampler(lengths, per_device * world * accumulation, 1, 1, seed, grouped)
    assert many.batches_per_epoch == one.batches_per_epoch == flat.batches_per_epoch
    for epoch in range(2):
        seen = []
        for position in range(many.batches_per_epoch):
            step = epoch * many.batches_per_epoch + position
            batch = many.batch(step)
            assert (batch.step, batch.epoch) == (step, epoch)
            assert batch.indices.tolist() == one.batch(step).indices.tolist() == flat.batch(step).indices.tolist()
            for m in range(accumulation):
                ranks = [batch.micro_batch(m, rank) for rank in range(world)]
                assert {len(part) for part in ranks} == {per_device}
                assert [row for column in zip(*ranks) for row in column] == one.batch(step).micro_batch(m, 0)
            seen += batch.indices.tolist()
        assert sorted(seen) == list(range(rows))


def test_resume_is_random_access() -> None:
    lengths = row_lengths(203)
    whole = GlobalBatchSampler(lengths, 2, 2, 2, seed=5)
    steps = 3 * whole.batches_per_epoch
    straight = [whole.batch(step).rows.tolist() for step in range(steps)]
    resumed = GlobalBatchSampler(lengths, 2, 2, 2, seed=5)
    for step in (steps - 1, 30, 7, 0, 31):
        assert resumed.batch(step).rows.tolist() == straight[step]


def test_order_is_pinned() -> None:
    """A resumed run must find the order it left, in every version of NumPy and of this file."""
    batch = GlobalBatchSampler([5, 1, 4, 2, 3, 9, 8, 7, 6, 10], 1, 2, 2, seed=1).batch
    expected = [[9, 6, 7, 8], [2, 4, 3, 1], [5, 0, NO_ROW, NO_ROW], [0, 2, 3, 1]]
    assert [batch(step).rows.tolist() for step in range(4)] == expected


def test_seed_and_epoch_change_the_order() -> None:
    lengths = row_lengths(64)
    sampler = GlobalBatchSampler(lengths, 4, 1, 1, seed=0)
    other = GlobalBatchSampler(lengths, 4, 1, 1, seed=1)
    first = [sampler.batch(step).rows.tolist() for step in range(16)]
    assert first != [sampler.batch(step).rows.tolist() for step in range(16, 32)]
    assert first != [other.batch(step).rows.tolist() for step in range(16)]


def test_last_batch_is_filled_up_at_its_end() -> None:
    sampler = GlobalBatchSampler(row_lengths(17), 2, 2, 2, seed=3)
    assert sampler.batches_per_epoch == 3
    last = sampler.batch(2)
    assert last.indices.size == 1 and last.rows[1:].tolist() == [NO_ROW] * 7
    assert last.micro_batch(0, 0)[0] == last.indices[0]
    assert last.micro_batch(1, 1) == [NO_ROW, NO_ROW]
    assert all(sampler.batch(step).indices.size == 8 for step in (0, 1, 3, 4))


def padding(lengths: np.ndarray, grouped: bool) -> float:
    sampler = GlobalBatchSampler(lengths, 8, 2, 2, seed=0, group_by_length=grouped)
    wasted = used = 0
    for step in range(sampler.batches_per_epoch):
        for m in range(2):
            for rank in range(2):
                rows = [lengths[row] for row in sampler.batch(step).micro_batch(m, rank) if row != NO_ROW]
                used += sum(rows)
                wasted += len(rows) * max(rows, default=0) - sum(rows)
    return wasted / (used + wasted)


def test_grouping_saves_padding_without_a_fixed_order_of_lengths() -> None:
    lengths = row_lengths(4000)
    # Uniform lengths: a random batch of 8 is padded by about 44 %, a sorted one by next to nothing.
    assert padding(lengths, grouped=True) < 0.05 < 0.3 < padding(lengths, grouped=False)
    sampler = GlobalBatchSampler(lengths, 8, 2, 2, seed=0)
    means = np.array([lengths[sampler.batch(step).indices].mean() for step in range(50)])
    assert abs(np.corrcoef(np.arange(50), means)[0, 1]) < 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_batch_size": 0}, "per_device_batch_size must be at least 1, got 0"),
        ({"world_size": -1}, "world_size must be at least 1, got -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"seed": -1}, "seed must be within 0..2"),
        ({"lengths": []}, "lengths must be a non-empty list"),
    ],
)
def test_sampler_arguments(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "lengths": [1, 2],
        "per_device_batch_size": 1,
        "world_size": 1,
        "gradient_accumulation_steps": 1,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**{**options, **change})


def test_batch_arguments() -> None:
    sampler = GlobalBatchSampler([1, 2, 3], 1, 2, 1, seed=0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        sampler.batch(-1)
    with pytest.raises(IndexError, match=r"micro-batch 1 is not within 0..0"):
        sampler.batch(0).micro_batch(1, 0)
    with pytest.raises(IndexError, match=r"rank 2 is not within 0..1"):
        sampler.batch(0).micro_batch(0, 2)


def test_collate() -> None:
    dataset = dataset_of([3, 1, 0])
    batch = collate(dataset, [0, NO_ROW, 1, 2], pad_token_id=9, pad_to_multiple_of=4)
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[1, 1, 1, 9], [9] * 4, [2, 9, 9, 9], [9] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 1, -100], [-100] * 4, [-100] * 4, [-100] * 4]


def test_collate_widths_and_errors() -> None:
    dataset = dataset_of([3, 8])
    widths = {multiple: collate(dataset, [0], 0, multiple)["input_ids"].shape[1] for multiple in (None, 1, 2, 3, 8)}
    assert widths == {None: 3, 1: 3, 2: 4, 3: 3, 8: 8}
    assert collate(dataset, [NO_ROW, NO_ROW], 0)["input_ids"].shape == (2, 1)
    assert collate(dataset, np.array([0, 1]), 0)["input_ids"].shape == (2, 8)
    with pytest.raises(ValueError, match="at least one row"):
        collate(dataset, [], 0)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        collate(dataset, [0], 0, 0)
    with pytest.raises(IndexError, match="row 2 is not within"):
        collate(dataset, [2], 0)


@pytest.mark.parametrize(("rows", "per_device", "world"), [(1, 1, 1), (1, 2, 3), (12, 2, 3), (13, 2, 3), (50, 4, 2)])
def test_eval_covers_each_row_once(rows: int, per_device: int, world: int) -> None:
    dataset = dataset_of(row_lengths(rows).tolist())
    ranks = [eval_batches(dataset, per_device, world, rank) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-rows // (per_device * world))}
    flat = [row for batches in ranks for batch in batches for row in batch]
    assert {len(batch) for batches in ranks for batch in batches} == {per_device}
    assert sorted(row for row in flat if row != NO_ROW) == list(range(rows))
    longest = [max(dataset.lengths[row] for row in batch if row != NO_ROW) for batch in ranks[0]]
    assert longest == sorted(longest, reverse=True)


def test_eval_arguments() -> None:
    with pytest.raises(ValueError, match=r"rank 2 is not within 0..1"):
        eval_batches(dataset_of([1]), 1, 2, 2)
    with pytest.raises(ValueError, match="per_device_batch_size must be at least 1"):
        eval_batches(dataset_of([1]), 0, 1, 0)


def test_padding_id(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="neither a pad token nor"):
        padding_id(make_tokenizer(specials=False))
