"""A tokenised dataset in three flat arrays: 5 bytes per token and 8 per row, whatever the rows looked like."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from .formats import RowFormatter
from .sources import iterate_rows

logger = logging.getLogger(__name__)

# Rows per tokenizer call: enough to keep the fast tokenizer busy, little enough to never hold many Python integers.
_ROWS_PER_CALL = 512


class TokenDataset:
    """Rows of token ids with their trained positions. Immutable.

    Args:
        name: what messages call the dataset.
        tokens: int32 [total tokens], the rows one after another.
        mask: bool [total tokens], True where the token is trained.
        offsets: int64 [rows + 1]; row i is tokens[offsets[i]:offsets[i + 1]].
        truncated_rows: how many rows lost their tail to max_length.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self, name: str, tokens: np.ndarray, mask: np.ndarray, offsets: np.ndarray, truncated_rows: int = 0
    ) -> None:
        self.name = name
        # Views, so that making them read-only leaves the caller's arrays as they were.
        self.tokens = np.asarray(tokens, dtype=np.int32).view()
        self.mask = np.asarray(mask, dtype=np.bool_).view()
        self.offsets = np.asarray(offsets, dtype=np.int64).view()
        self.truncated_rows = truncated_rows
        if self.offsets.size == 0 or self.offsets[0] != 0 or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"{name}: offsets must start at 0 and never fall")
        if not self.offsets[-1] == self.tokens.size == self.mask.size:
            sizes = f"{self.offsets[-1]}, {self.tokens.size} and {self.mask.size}"
            raise ValueError(f"{name}: offsets, tokens and mask disagree on the number of tokens: {sizes}")
        for part in (self.tokens, self.mask, self.offsets):
            part.flags.writeable = False

    def __len__(self) -> int:
        return int(self.offsets.size) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], mask bool [T]) of one row, as read-only views. A negative number is an IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} is not within 0..{len(self) - 1}")
        row = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[row], self.mask[row]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens per row."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """int64 [rows]: losses per row, that is trained positions that have a predecessor to be predicted from."""
        total = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        counts = total[self.offsets[1:]] - total[self.offsets[:-1]]
        starts = self.offsets[:-1][self.lengths > 0]
        counts[self.lengths > 0] -= self.mask[starts]
        return counts

    @property
    def unlabelled_rows(self) -> int:
        """Rows that contribute no loss, most often because max_length cut their answer off."""
        return int(np.count_nonzero(self.label_counts == 0))


def load_dataset_tokens(
    path_or_name: str,
    tokenizer: Any,
    max_length: int,
    split: str = "train",
    limit: int | None = None,
    *,
    key: str = "data.train",
) -> TokenDataset:
    """Read, format and tokenise a dataset. The layouts are those of `formats.py`.

    Args:
        path_or_name: a "*.jsonl" or "*.json" file, a folder saved by `datasets.save_to_disk`, or else a Hugging Face
            dataset name; folder and name may end in ":split".
        tokenizer: a Hugging Face tokenizer.
        max_length: longer rows keep their head.
        split: taken when the dataset has splits and `path_or_name` names none.
        limit: read only the first rows.
        key: the configuration key that the dataset comes from, named in errors.

    Raises:
        FileNotFoundError: no such file, folder or dataset.
        ValueError: broken JSON or a row that fits no layout (named by file and line); no rows; no label at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{key}: limit must be at least 1 or None, got {limit}")
    formatter = RowFormatter(tokenizer, max_length)
    tokens, mask, offsets, truncated = array("i"), bytearray(), array("q", [0]), 0
    rows: Iterator[tuple[str, Any]] = islice(iterate_rows(str(path_or_name), split, key), limit)
    while batch := list(islice(rows, _ROWS_PER_CALL)):
        for row in formatter.encode(batch):
            tokens.extend(row.ids)
            mask.extend(row.mask)
            offsets.append(len(tokens))
            truncated += row.truncated
    if len(offsets) == 1:
        raise ValueError(f"{key}: the dataset {path_or_name} is empty")
    dataset = TokenDataset(
        str(path_or_name),
        np.frombuffer(tokens, dtype=np.int32),
        np.frombuffer(mask, dtype=np.bool_),
        np.frombuffer(offsets, dtype=np.int64),
        truncated,
    )
    _report(dataset, max_length, key)
    return dataset


def _report(dataset: TokenDataset, max_length: int, key: str) -> None:
    if dataset.unlabelled_rows == len(dataset):
        raise ValueError(
            f"{key}: no row of {dataset.name} has a position to train on "
            f"({dataset.truncated_rows} of {len(dataset)} rows were cut to max_length {max_length})"
        )
    if dataset.truncated_rows or dataset.unlabelled_rows:
        logger.warning(
            "%s: %d of %d rows were cut to %d tokens; %d rows have no label left and contribute no loss",
            dataset.name, dataset.truncated_rows, len(dataset), max_length, dataset.unlabelled_rows,
        )  # fmt: skip
