"""A frozen matrix as it is stored: one plain tensor, or the parts of an encoding (codes and their scales).

A channel is a row of the parts and is decoded alone (:mod:`sparselora_kernels.formats`). What autograd keeps is the parts
themselves, never decoded rows: under ZeRO-3 and FSDP2 the parts are sharded between forward and backward and gathered again,
and a kept copy would undo that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .formats import FORMATS, NF4, PLAIN, every_of, multiplies, numbers_of


class EncodedWeight(NamedTuple):
    """A matrix in parts."""

    parts: Sequence[Tensor]
    layout: Sequence[int] = PLAIN
    """:data:`PLAIN` for one tensor of values, such as :func:`nf4_layout`'s for an encoding."""
    first: int = 0
    """Number of the parts' first row in the matrix that was encoded."""

    @property
    def plain(self) -> bool:
        """Whether it is one tensor of values."""
        return self.layout[0] == PLAIN[0]

    @property
    def nf4(self) -> bool:
        """Whether it is codes and scales that the products' own kernels decode."""
        return self.layout[0] == NF4

    @property
    def length(self) -> int:
        """Values per row."""
        return self.parts[0].shape[1] if self.plain else self.layout[1]

    @property
    def channels(self) -> int:
        """Rows."""
        return self.parts[0].shape[0]

    def decode(self, channels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows ``channels`` (k,) int64, or all of them, in ``dtype``: (k, length). All rows of a plain matrix that has
        the dtype are the matrix itself, not a copy."""
        if self.plain:
            rows = self.parts[0]
            return (rows if channels is None else rows.index_select(0, channels)).to(dtype)
        return FORMATS[self.layout[0]].decode(self.parts, self.layout, channels, dtype, self.first)

    def once(self, whole: bool, dtype: torch.dtype) -> EncodedWeight:
        """The matrix as several products read it: decoded here where one of them is ``whole``, else as it is stored, and
        so is one that needs no decoding."""
        return EncodedWeight((self.decode(None, dtype),)) if whole and not self.multiplies(dtype) else self

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether it is multiplied as it is stored, by operands in ``dtype``."""
        return multiplies(self.layout, self.parts[0], dtype)


Weight: TypeAlias = "Tensor | EncodedWeight"


def rows_of(weight: Weight, rows: slice) -> EncodedWeight:
    """Rows ``start:stop`` of a stored matrix as a matrix: a gate inside a matrix that holds gate and up.

    Nothing is cut here. The parts stay whole, and the layout says which rows are meant: what an operation keeps for
    backward is then the parameter itself, which an engine may take away and bring back, and no view of its memory.
    """
    stored = unpack(weight)
    first, stop, _ = rows.indices(stored.channels)
    return EncodedWeight(stored.parts, (*stored.layout, first, stop - first))


def weight_of(parts: Sequence[Tensor], layout: Sequence[int]) -> EncodedWeight:
    """The matrix of an operation's arguments; one of :func:`rows_of` has views in the place of its parts."""
    own, rows = split_layout(layout)
    if not rows:
        return EncodedWeight(parts, own)
    first, count = rows
    views = [part[first : first + count] if every == 1 else part for part, every in zip(parts, every_of(own))]
    return EncodedWeight(views, own, first)


def split_layout(layout: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """How a matrix is stored, and ``(first, count)`` where only some of its rows are meant."""
    own = numbers_of(layout)
    return layout[:own], layout[own:]


def unpack(weight: Weight) -> EncodedWeight:
    """Any stored matrix as parts and their layout."""
    return weight if isinstance(weight, EncodedWeight) else EncodedWeight((weight,))


def refuse_trainable(operation: str, weight: EncodedWeight, bias: Tensor | None) -> None:
    """Raises ValueError for what the operation computes no gradient for."""
    if any(part.requires_grad for part in weight.parts) or (bias is not None and bias.requires_grad):
        raise ValueError(f"{operation} computes no weight gradient: freeze the weight and the bias")
