"""The experts of a layer in a quantised checkpoint: a matrix each, one below another in the bank that a run keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codecs import Codec, FloatsCodec
from .matrix import REMEDY, PrequantizedError, StoredMatrix


@dataclass(frozen=True, slots=True)
class StoredBank:
    """Matrices of one shape, stored alike."""

    matrices: Sequence[StoredMatrix]
    """In the order of their rows."""
    name: str
    """What the files call the first, for messages."""
    transposed: bool
    """Whether a stored row is an input, as of down."""

    @property
    def channels(self) -> int:
        """Stored rows of one of them."""
        return self.matrices[0].shape[1 if self.transposed else 0]

    def codec(self, asked: Codec) -> Codec:
        """How a run that asks for the codec ``asked`` stores the bank.

        Raises:
            PrequantizedError: the run asks for something else, or experts are stored in a way that is not read.
        """
        first, *others = (matrix.codec(asked, self.transposed) for matrix in self.matrices)
        assert isinstance(first, FloatsCodec)
        try:
            if any(other != first for other in others):
                raise ValueError("they are not stored alike")
            return first.stacked(self.channels)
        except ValueError as error:
            raise PrequantizedError(f"{self.name} and the other experts' are quantised: {error}. {REMEDY}") from error

    def part(self, name: str, count: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` ... ``stop - 1`` of a part that has ``count`` rows in all."""
        each = count // len(self.matrices)
        found = [
            self._of(number, name, max(start - number * each, 0), min(stop - number * each, each))
            for number in range(start // each, -(-stop // each))
        ]
        return torch.cat(found or [self._of(0, name, 0, 0)])

    def _of(self, number: int, name: str, start: int, stop: int) -> Tensor:
        rows = self.matrices[number].part(name, start, stop, self.transposed)
        assert rows is not None, f"{self.name} has no {name}"
        return rows

    def mark(self) -> str:
        """What tells it from other banks."""
        return hashlib.sha256("".join(matrix.mark() for matrix in self.matrices).encode()).hexdigest()[:32]
