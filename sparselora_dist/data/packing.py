"""Rows of an optimizer step laid one after another into as few micro-batches as a token budget allows.

Which rows meet in a micro-batch, and so choose their masks together, depends on the rows and on the budget over all ranks
alone, not on how many ranks share it. Inside a micro-batch the rows are dealt so that every rank has the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .dataset import TokenDataset
from .loader import IGNORE


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The rows of one optimizer step by micro-batch and rank."""

    parts: tuple[tuple[tuple[int, ...], ...], ...]
    """[micro-batch][rank] -> row numbers; a rank may have none."""

    @property
    def indices(self) -> np.ndarray:
        """int64, all rows."""
        return np.asarray([row for part in self.parts for rows in part for row in rows], dtype=np.int64)

    @property
    def accumulation(self) -> int:
        """Micro-batches, the same number on every rank."""
        return len(self.parts)

    def micro_batch(self, m: int, rank: int) -> list[int]:
        """The rows of micro-batch ``m`` on ``rank``."""
        return list(self.parts[m][rank])


def pack(
    rows: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    budget: int,
    world_size: int,
    quadratic: float = 0.0,
) -> PackedBatch:
    """Pack rows into micro-batches of at most ``budget`` tokens a rank.

    The ranks of a micro-batch share ``budget * world_size`` tokens: a rank's own part is as even as whole rows allow, and
    may pass the budget by less than the longest row.

    Args:
        rows: row numbers.
        lengths: int [all rows], tokens; a row counts at least one.
        budget: tokens a rank and micro-batch; a longer row has a micro-batch to itself.
        world_size: ranks.
        quadratic: attention's work per token squared over the other work per token: ranks are balanced by
            ``T + quadratic * T**2``.

    Raises:
        ValueError: budget or world_size below 1.
    """
    if budget < 1 or world_size < 1:
        raise ValueError(f"budget and world_size must be at least 1, got {budget} and {world_size}")
    sizes = np.maximum(np.asarray(lengths, dtype=np.int64)[np.asarray(rows, dtype=np.int64)], 1)
    work = sizes + quadratic * sizes.astype(float) ** 2
    parts = []
    for bin_ in _fill_bins(sizes, budget * world_size):
        shares = _deal(work[bin_], world_size)
        parts.append(tuple(tuple(int(rows[bin_[i]]) for i in sorted(share)) for share in shares))
    return PackedBatch(tuple(parts))


def packed_eval_batches(
    lengths: np.ndarray, budget: int, world_size: int, rank: int, quadratic: float = 0.0
) -> list[list[int]]:
    """The batches of one rank over a whole dataset, longest rows first; every rank gets the same number, some may be empty.

    Rows are taken in order while they fit, so that the work is linear in their number. See :func:`pack`.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.maximum(lengths[order], 1).cumsum()
    batches, first = [], 0
    while first < order.size:
        filled = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, filled + budget * world_size, side="right")))
        rows = order[first:last]
        size = np.maximum(lengths[rows], 1).astype(float)
        shares = _deal(size + quadratic * size**2, world_size)
        batches.append([int(rows[item]) for item in sorted(shares[rank])])
        first = last
    return batches


def _fill_bins(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """As few bins as best-fit decreasing finds, and with that number as even as the capacity allows."""
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    room: list[int] = []
    for item in order:
        fits = [number for number, left in enumerate(room) if left >= sizes[item]]
        if fits:
            best = min(fits, key=lambda number: (room[number], number))
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(int(item))
        room[best] -= int(sizes[item])
    even = _deal(sizes.astype(float), max(1, len(bins)))
    if max(int(sizes[share].sum()) for share in even) <= capacity:
        bins = even
    return [sorted(items) for items in bins]


def _deal(work: np.ndarray, parts: int) -> list[list[int]]:
    """Items to parts, the largest first, each to the part with the least so far; every tie to the first."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = np.zeros(parts)
    for item in np.argsort(-work, kind="stable"):
        part = int(load.argmin())
        shares[part].append(int(item))
        load[part] += work[item]
    return shares


def collate_packed(dataset: TokenDataset, rows: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows -> one line without padding: ``input_ids``, ``labels``, ``position_ids``, ``real``, each int64 (1, T), and
    ``lengths`` int64 (rows,).

    Positions begin anew with every row. A row's first token has no label: nothing before it predicts it. No rows at all,
    or a row without tokens, is one pad token that ``real`` marks 0: it is neither computed sparsely nor scored.
    """
    empty = (np.asarray([pad_token_id], dtype=np.int32), np.zeros(1, dtype=np.bool_))
    found = [dataset[row] for row in rows]
    found = [(ids, mask) if ids.size else empty for ids, mask in found] or [empty]
    real = [np.full(ids.size, ids is not empty[0], dtype=np.int64) for ids, _ in found]
    labels = [np.where(mask, ids, IGNORE) for ids, mask in found]
    for line in labels:
        line[0] = IGNORE
    arrays = {
        "input_ids": [ids for ids, _ in found],
        "labels": labels,
        "position_ids": [np.arange(ids.size) for ids, _ in found],
        "real": real,
    }
    batch = {name: torch.from_numpy(np.concatenate(parts).astype(np.int64))[None] for name, parts in arrays.items()}
    return batch | {"lengths": torch.tensor([ids.size for ids, _ in found])}
