"""Calibration tokens: sequences of one length, cut from the rows of a data set one after another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import load_dataset_tokens


@dataclass(frozen=True, slots=True)
class Calibration:
    """``sequences`` (n, length) int64, and the hash of their tokens."""

    sequences: Tensor
    mark: str


def read_sequences(data: str, tokenizer: Any, count: int, length: int) -> Calibration:
    """The first ``count`` sequences of ``length`` tokens.

    Raises:
        ConfigError: the data have fewer tokens.
        ValueError, OSError: the data cannot be read.
    """
    # Rows are laid one after another, so none is cut.
    rows = load_dataset_tokens(data, tokenizer, 1 << 30, "train", key="--data")
    needed, tokens = count * length, torch.from_numpy(rows.tokens.copy()).long()
    if tokens.numel() < needed:
        raise ConfigError(
            f"--data {data} has {tokens.numel()} tokens, {count} sequences of {length} need {needed}: give more data, "
            f"--sequences {tokens.numel() // length}, or a smaller --length"
        )
    sequences = tokens[:needed].view(count, length)
    return Calibration(sequences, hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:32])
