"""The rows that are measured on, dealt out so that nothing depends on the number of ranks; and what the data is like."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..data import NO_ROW, TokenDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShape:
    """Totals over a dataset: what the FLOPs of training on it depend on."""

    tokens: int
    context: int
    """Tokens that carry no label and do not predict one."""
    labels: int
    length: float
    """Mean length of the sequence that a token stands in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Rows of a dataset in global micro-batches: the channels are chosen over all rows of one."""

    batches: tuple[tuple[int, ...], ...]
    """Row numbers, each batch of the same size, filled up with NO_ROW."""
    labels: int
    """Label tokens of all rows."""
    sha256: str
    """Of the rows' tokens and labels."""

    @property
    def rows(self) -> int:
        return sum(row != NO_ROW for batch in self.batches for row in batch)

    @property
    def batch_size(self) -> int:
        return len(self.batches[0])


def context_mask(dataset: TokenDataset) -> np.ndarray:
    """bool [total tokens]: the tokens that sparse layers compute sparsely, as ``method/tokens.py`` splits a batch."""
    following = np.roll(dataset.mask, -1)
    ends = dataset.offsets[1:][dataset.lengths > 0] - 1
    following[ends] = False
    return ~(dataset.mask | following)


def data_shape(dataset: TokenDataset) -> DataShape:
    """Totals of the dataset."""
    lengths = dataset.lengths.astype(np.float64)
    tokens = int(lengths.sum())
    return DataShape(
        tokens=tokens,
        context=int(context_mask(dataset).sum()),
        labels=int(dataset.label_counts.sum()),
        length=float((lengths**2).sum() / max(tokens, 1)),
    )


def take_sample(dataset: TokenDataset, rows: int, batch_size: int, seed: int) -> Sample:
    """``rows`` random rows (all, where there are fewer) among those with labels and context tokens, longest first.

    Raises:
        ValueError: no row has both.
    """
    counts = np.concatenate([[0], np.cumsum(context_mask(dataset), dtype=np.int64)])
    context = counts[dataset.offsets[1:]] - counts[dataset.offsets[:-1]]
    usable = np.flatnonzero((context > 0) & (dataset.label_counts > 0))
    if not usable.size:
        raise ValueError(
            f"data.train: no row of {dataset.name} has context tokens beside its labels (every token carries a label or "
            "predicts one), so that nothing would be computed sparsely and there is nothing to calibrate: use rows with a "
            "prompt, or plain LoRA"
        )
    # RandomState: its streams are frozen, so that a calibration goes on under another NumPy.
    chosen = usable[np.random.RandomState(seed).permutation(usable.size)[:rows]]
    chosen = chosen[np.argsort(-dataset.lengths[chosen], kind="stable")]
    digest = hashlib.sha256()
    for row in chosen:
        ids, mask = dataset[int(row)]
        digest.update(np.ascontiguousarray(ids).tobytes() + np.ascontiguousarray(mask).tobytes() + b"|")
    filled = np.concatenate([chosen, np.full(-chosen.size % batch_size, NO_ROW, dtype=np.int64)])
    return Sample(
        batches=tuple(tuple(int(row) for row in batch) for batch in filled.reshape(-1, batch_size)),
        labels=int(dataset.label_counts[chosen].sum()),
        sha256=digest.hexdigest(),
    )
