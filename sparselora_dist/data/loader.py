"""Which rows a step trains on, and how rows become tensors. Knows of distribution only the two integers rank and world.

The order of the data is a function of (row lengths, seed, epoch, global batch size) alone. It therefore does not change
with the number of ranks, and the data position of a run is its step number: there is nothing else to checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .dataset import TokenDataset

NO_ROW = -1
"""Stands for a row that is not there: one token, no label."""

IGNORE = -100
"""The label that the loss skips."""

# Rows are sorted within this many global batches. Few: much padding. Many: batches are the same ones every epoch.
MEGA_BATCHES = 50


@dataclass(frozen=True, slots=True, eq=False)
class GlobalBatch:
    """The rows of one optimizer step over all ranks.

    rows: int64 [accumulation * world_size * per_device_batch_size], NO_ROW where the epoch ran out of rows.
    """

    step: int
    epoch: int
    rows: np.ndarray
    per_device_batch_size: int
    world_size: int
    accumulation: int

    @property
    def indices(self) -> np.ndarray:
        """int64 [at most the global batch size]: the real rows, without stand-ins."""
        return self.rows[self.rows != NO_ROW]

    def micro_batch(self, m: int, rank: int) -> list[int]:
        """The `per_device_batch_size` rows of micro-batch m on a rank, NO_ROW among them.

        Over all ranks, micro-batch m is the micro-batch m of a single process with per_device * world rows. The split
        is by stride, because neighbours have similar lengths: each rank gets its share of long rows.

        Raises:
            IndexError: m or rank out of range.
        """
        if not 0 <= m < self.accumulation:
            raise IndexError(f"micro-batch {m} is not within 0..{self.accumulation - 1}")
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not within 0..{self.world_size - 1}")
        size = self.per_device_batch_size * self.world_size
        return [int(row) for row in self.rows[m * size : (m + 1) * size][rank :: self.world_size]]


class GlobalBatchSampler:
    """Shuffled, length-grouped global batches with random access by step.

    Every row appears once per epoch. Rows that do not fill a global batch form the last one of the epoch, filled up
    with NO_ROW so that each rank always runs the same number of micro-batches of the same number of rows.

    Args:
        lengths: int [rows], tokens per row.
        per_device_batch_size, world_size, gradient_accumulation_steps: their product is the global batch size.
        seed: 0 <= seed < 2**32.
        group_by_length: rows of a batch have similar lengths; False gives plain shuffling.

    Raises:
        ValueError: no rows, or a number out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        per_device_batch_size: int,
        world_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        group_by_length: bool = True,
    ) -> None:
        _check_positive(
            per_device_batch_size=per_device_batch_size,
            world_size=world_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be within 0..2**32-1, got {seed}")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.ndim != 1 or self._lengths.size == 0:
            raise ValueError(f"lengths must be a non-empty list of row lengths, got shape {self._lengths.shape}")
        self._per_device = per_device_batch_size
        self._world = world_size
        self._accumulation = gradient_accumulation_steps
        self._seed = seed
        self._grouped = group_by_length
        self._order: tuple[int, np.ndarray] | None = None
        self.global_batch_size = per_device_batch_size * world_size * gradient_accumulation_steps

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch, the incomplete one included."""
        return -(-int(self._lengths.size) // self.global_batch_size)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0 through all epochs. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        rows = self._order[1][position]
        return GlobalBatch(step, epoch, rows, self._per_device, self._world, self._accumulation)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int64 [batches, global batch size] of row numbers, NO_ROW only at the end of the last batch."""
        size = self.global_batch_size
        # RandomState, not Generator: its streams are frozen, so a run resumes in the same order under another NumPy.
        random = np.random.RandomState([self._seed, epoch])
        order = random.permutation(self._lengths.size)
        # The remainder is set aside before sorting: taken after it, it would always be the shortest rows.
        full, rest = np.split(order, [order.size - order.size % size])
        if self._grouped and full.size:
            for start in range(0, full.size, MEGA_BATCHES * size):
                chunk = full[start : start + MEGA_BATCHES * size]
                full[start : start + chunk.size] = chunk[np.argsort(-self._lengths[chunk], kind="stable")]
            full = full.reshape(-1, size)[random.permutation(full.size // size)].reshape(-1)
        if self._grouped:
            rest = rest[np.argsort(-self._lengths[rest], kind="stable")]
        filler = np.full(-order.size % size, NO_ROW, dtype=np.int64)
        rows = np.concatenate([full, rest, filler]).astype(np.int64).reshape(-1, size)
        rows.flags.writeable = False
        return rows


def eval_batches(dataset: TokenDataset, per_device_batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """The batches of one rank over the whole dataset, longest rows first (little padding, and memory peaks at once).

    Every rank gets the same number of batches of `per_device_batch_size` rows; over all ranks each row appears once,
    and NO_ROW fills up the last batches.

    Raises:
        ValueError: a number out of range.
    """
    _check_positive(per_device_batch_size=per_device_batch_size, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not within 0..{world_size - 1}")
    size = per_device_batch_size * world_size
    order = np.argsort(-dataset.lengths, kind="stable")
    rows = np.concatenate([order, np.full(-order.size % size, NO_ROW, dtype=np.int64)])
    mine: list[list[int]] = rows.reshape(-1, size)[:, rank::world_size].tolist()
    return mine


def collate(
    dataset: TokenDataset, indices: Sequence[int], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """Rows -> {"input_ids", "attention_mask", "labels"}, each int64 [len(indices), T], padded on the right.

    T is the longest row, rounded up to `pad_to_multiple_of`. Labels are not shifted; they are -100 on untrained
    positions and on padding. NO_ROW, or a row without tokens, becomes one attended pad token without a label: attention
    over nothing at all is undefined (softmax of an empty set), and labels of -100 keep it out of the loss.

    Raises:
        ValueError: no indices, or pad_to_multiple_of below 1.
        IndexError: a row that the dataset does not have.
    """
    if not len(indices):
        raise ValueError("collate needs at least one row")
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    _check_positive(pad_to_multiple_of=multiple)
    empty = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
    rows = [empty if index == NO_ROW else dataset[index] for index in indices]
    longest = max(1, max(ids.size for ids, _ in rows))
    shape = (len(rows), -(-longest // multiple) * multiple)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for line, (ids, mask) in enumerate(rows):
        input_ids[line, : ids.size] = ids
        attention_mask[line, : max(1, ids.size)] = 1
        labels[line, : ids.size] = np.where(mask, ids, IGNORE)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token, else the end-of-sequence token (padding is never attended or trained).

    Raises:
        ValueError: the tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError("the tokenizer has neither a pad token nor an end-of-sequence token to pad batches with")


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
