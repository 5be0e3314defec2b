"""What an indexed product multiplies, adds and writes, but for the matrix: that alone differs between implementations.

The vendor's form takes it as it is stored (:class:`~sparselora_kernels.stored.EncodedWeight`), the Triton kernels as they
read it (``gpu.matrix.Matrix``), the reference as plain values. In all of them the channel is dim 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NTOperands(NamedTuple):
    """``x[rows] · weight[channels]ᵀ + bias[channels]``, with a weight (C, in)."""

    x: Tensor
    """(T, in)."""
    rows: Tensor | None
    """(n,) int64 tokens, each at most once; ``None`` for all T."""
    channels: Tensor | None
    """(k,) int64 rows of the weight, ascending; ``None`` for all C."""
    bias: Tensor | None = None
    """(C,)."""


class NNOperands(NamedTuple):
    """``out[rows] = H · weight[channels] + bias + low · bᵀ``, with a weight (C, out)."""

    h: Tensor
    """``H``, (n, k)."""
    rows: Tensor | None
    """(n,) int64 tokens, each at most once; ``None`` for all T."""
    channels: Tensor | None
    """(k,) int64 rows of the weight, ascending; ``None`` for all C."""
    out: Tensor
    """(T, out) in ``h.dtype``, written at ``rows`` only."""
    bias: Tensor | None = None
    """(out,)."""
    low: Tensor | None = None
    """(n, R), with ``b`` a low-rank update; both or neither."""
    b: Tensor | None = None
    """(out, R)."""
    accumulate: bool = False
    """Add to what ``out`` holds there."""
