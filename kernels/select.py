"""Choosing channels: how many, and which.

    k = ceil((1 - s) · n)
    kept = indices of the k largest scores, ascending; among equal scores the lowest index wins

``torch.topk`` promises nothing about ties and ranks NaN first, so that two ranks with equal scores could choose
differently. A stable sort does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# (1 - 0.7) * 10 is 3.0000000000000004 in floating point; the ceiling must still be 3.
_ROUNDING = 1e-9


def kept_count(channels: int, sparsity: float) -> int:
    """``k = ceil((1 - sparsity) · channels)``, at least 1, for ``sparsity`` in [0, 1)."""
    return max(1, math.ceil((1.0 - sparsity) * channels * (1.0 - _ROUNDING)))


def select_channels(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest of ``scores`` (n,), ascending, int64. Does not wait for the device."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values
