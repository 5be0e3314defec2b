"""Reference of ``kernels/nonzero.py`` for a plain matrix."""

from __future__ import annotations

from torch import Tensor


def nonzero(weight: Tensor, channels: Tensor | None = None) -> Tensor:
    """See :func:`sparselora_kernels.nonzero`."""
    return (weight if channels is None else weight[channels]) != 0
