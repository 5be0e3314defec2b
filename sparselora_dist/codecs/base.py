"""The interface of a storage format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, Weight
from sparselora_kernels.stored import unpack

from ..sharding.placement import Share, alone


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a matrix is stored as: (C, width) of ``dtype``, or fewer rows."""

    width: int
    dtype: torch.dtype
    every: int = 1
    """How many channels in a line share a row; 0 where all do: one row."""

    def rows(self, channels: int) -> int:
        """Of a matrix with so many channels."""
        return -(-channels // self.every) if self.every else 1

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def bytes(self, channels: int) -> int:
        """Of a matrix with so many channels."""
        return self.rows(channels) * self.row_bytes


class Codec(ABC):
    """Stores a frozen matrix as parts with the channel as dim 0, so that any rows can be sharded and decoded alone.

    What several channels share (a mask of columns, a scale of 16 channels) is a part with fewer rows, sharded like the rest.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The format, as messages call it."""

    @property
    @abstractmethod
    def mark(self) -> str:
        """What tells stored matrices from those of another codec, in front of a fingerprint of the source."""

    @abstractmethod
    def parts(self, length: int) -> dict[str, Part]:
        """The parts of a matrix whose rows have ``length`` values, by parameter name."""

    @abstractmethod
    def encode(self, rows: Tensor, first: int, share: Share = alone) -> dict[str, Tensor]:
        """Encode rows ``first`` ... ``first + n - 1`` of a matrix.

        Args:
            rows: (n, length) floating point, the rows of this rank; n may be zero.
            first: number of the first of them in the whole matrix.
            share: for what depends on the whole matrix. Every rank that holds rows of it must encode at the same time.

        Returns:
            The parts, (n, width) each: a codec with parts of fewer rows makes none, its matrices are read from files.

        Raises:
            ValueError: a value cannot be stored, or the format is not made when a model is loaded.
        """

    @abstractmethod
    def stored(self, parts: tuple[Tensor, ...], length: int) -> Weight:
        """The parts, in the order of :meth:`parts`, as the kernels take them."""

    def whole(self, matrix: Tensor) -> EncodedWeight:
        """A whole matrix (C, length), stored."""
        encoded = self.encode(matrix, 0)
        return unpack(self.stored(tuple(encoded[name] for name in self.parts(matrix.shape[1])), matrix.shape[1]))

    def roundtrip(self, matrix: Tensor) -> Tensor:
        """What a whole matrix (C, length) becomes by being stored, in its own dtype."""
        return self.whole(matrix).decode(None, matrix.dtype)
