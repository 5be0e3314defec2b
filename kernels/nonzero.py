"""Which positions of a stored matrix are not zero: the mask of a pruned matrix, read from the matrix each time.

Of NF4 it is read from codes, whose level 7 is 0.0: a block whose scale is zero, or too small for the dtype, decodes to zeros
that were none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .backend import use_triton
from .nf4 import levels
from .stored import EncodedWeight, Weight, unpack

_CHUNK = 1 << 16
"""Values that are compared at a time on a CPU: in its cache."""


def nonzero(weight: Weight, channels: Tensor | None = None) -> Tensor:
    """Where rows ``channels`` (k,) int64 of a matrix, or all of them, are not zero: (k, length) bool."""
    stored = unpack(weight)
    rows = stored.parts[0] if channels is None else stored.parts[0].index_select(0, channels)
    return _flags(rows, stored, torch.bool)


def keep_nonzero(values: Tensor, weight: Weight, channels: Tensor | None = None) -> Tensor:
    """``values`` (k, length), zeroed in place where :func:`nonzero` is false; returned."""
    stored = unpack(weight)
    if use_triton(values):
        from .gpu import masked

        if masked.takes(values, stored):
            return masked.keep_nonzero(values, stored, channels)
    step = max(1, _CHUNK // max(1, stored.length))
    for start in range(0, values.shape[0], step):
        part = values[start : start + step]
        if channels is None:
            rows = stored.parts[0][start : start + step]
        else:
            rows = stored.parts[0].index_select(0, channels[start : start + step])
        part.mul_(_flags(rows, stored, values.dtype))
    return values


def _flags(rows: Tensor, stored: EncodedWeight, dtype: torch.dtype) -> Tensor:
    """One where stored rows (values or codes) are not zero, (n, length) in ``dtype``."""
    if stored.plain:
        # Several times faster on a CPU than a comparison, whose result has another width.
        return rows != 0 if dtype is torch.bool else rows.sign().abs_().to(dtype)
    pairs = _pairs(rows.device, dtype).index_select(0, rows.reshape(-1).int())
    return pairs.view(rows.shape[0], 2 * rows.shape[1])[:, : stored.length]


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each byte of codes, whether its two values are not zero: (256, 2)."""
    kept = levels(device) != 0
    byte = torch.arange(256, device=device)
    return torch.stack([kept[byte >> 4], kept[byte & 15]], 1).to(dtype)
