"""The interface of a matrix that a checkpoint holds encoded, whoever encoded it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ...codecs import Codec

REMEDY = "Use the bf16 checkpoint that it was made from"
_BLOCK = 1024


class PrequantizedError(ValueError):
    """A quantised checkpoint in a form that is not read, or not as the run asks for it."""


class StoredMatrix(ABC):
    """One encoded matrix of a checkpoint, of a linear (out, in). Nothing is encoded anew where that can be helped."""

    shape: tuple[int, int]
    least_zeros: float = 0.01
    """The share of zeros below which it is not taken for a pruned one: weights without zeros have codes of zero too."""

    @abstractmethod
    def codec(self, asked: Codec, transposed: bool) -> Codec:
        """How a run that asks for the codec ``asked`` stores it; ``transposed`` as :class:`FrozenLinear` says.

        Raises:
            PrequantizedError: the run asks for something else; the key of the run is named.
        """

    @abstractmethod
    def part(self, name: str, start: int, stop: int, transposed: bool) -> Tensor | None:
        """Rows ``start`` ... ``stop - 1`` of a part of :meth:`codec`'s; ``None`` where the files hold nothing like it, so
        that the values must be encoded."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` ... ``stop - 1`` of (out, in), decoded, in fp32."""

    @abstractmethod
    def mark(self) -> str:
        """What tells it from other matrices: the format and a hash of a sample."""

    def kept(self, start: int, stop: int) -> Tensor:
        """Where rows ``start`` ... ``stop - 1`` of (out, in) are not zero, bool; of codes where the code is not that of
        zero, if the format has one."""
        return self.rows(start, stop) != 0

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` ... ``stop - 1`` of all rows, decoded: (stop - start, out) fp32."""
        return columns_of(self.rows, self.shape[0], start, stop)


def columns_of(rows: Callable[[int, int], Tensor], count: int, start: int, stop: int) -> Tensor:
    """Columns ``start`` ... ``stop - 1`` of ``count`` rows, (stop - start, count) fp32; a few rows at a time are decoded.

    Args:
        rows: gives rows ``first`` ... ``last - 1``, fp32.
    """
    result = torch.empty(stop - start, count)
    for first in range(0, count if stop > start else 0, _BLOCK):
        last = min(first + _BLOCK, count)
        result[:, first:last] = rows(first, last)[:, start:stop].t()
    return result
