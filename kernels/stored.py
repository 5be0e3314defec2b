"""A frozen matrix as it is stored: one plain tensor, or the parts of an encoding (4-bit codes and their scales).

Every part has the channel as dim 0, so that a channel is decoded alone. What autograd keeps is the parts themselves,
never decoded rows: under ZeRO-3 and FSDP2 the parts are sharded between forward and backward and gathered again, and a
kept copy would undo that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Decode = Callable[[tuple[Tensor, ...], Tensor | None, torch.dtype], Tensor]
"""``(parts, channels or None for all, dtype) -> (k, length)``; must hold no tensor of its own."""


class EncodedWeight(NamedTuple):
    """A matrix in parts."""

    parts: tuple[Tensor, ...]
    decode: Decode


Weight: TypeAlias = "Tensor | EncodedWeight"


def plain_rows(parts: tuple[Tensor, ...], channels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The encoding of a plain tensor: its rows, in ``dtype``."""
    (weight,) = parts
    rows = weight if channels is None else weight.index_select(0, channels)
    return rows.to(dtype)


def unpack(weight: Weight) -> EncodedWeight:
    """Any stored matrix as parts and their decoding."""
    return weight if isinstance(weight, EncodedWeight) else EncodedWeight((weight,), plain_rows)


def whole_and_kept(weight: EncodedWeight, whole: bool, channels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All rows and the ``channels`` among them, decoded once. Without ``whole`` the first is empty and only the kept
    rows are decoded."""
    if not whole:
        kept = weight.decode(weight.parts, channels, dtype)
        return kept[:0], kept
    rows = weight.decode(weight.parts, None, dtype)
    return rows, rows.index_select(0, channels)
