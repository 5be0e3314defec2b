"""Which positions of a stored matrix are not zero: the mask of a pruned matrix, read from the matrix each time.

Of an encoded matrix it is read from codes: level 7 of NF4 is 0.0, and so are the two zeros of fp8 and fp4. A block whose
scale is zero, or too small for the dtype, decodes to zeros that were none.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .backend import use_triton
from .floats import code_values
from .formats import FLOATS
from .nf4 import levels
from .stored import EncodedWeight, Weight, unpack

_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 24
"""Values that are compared at a time: on a CPU in its cache, on a GPU in few launches."""


def nonzero(weight: Weight, channels: Tensor | None = None) -> Tensor:
    """Where rows ``channels`` (k,) int64 of a matrix, or all of them, are not zero: (k, length) bool.

    Raises:
        ValueError: its format has no code for zero.
    """
    stored = unpack(weight)
    rows = stored.parts[0] if channels is None else stored.parts[0].index_select(0, channels)
    return _flags(rows, stored, torch.bool)


def keep_nonzero(values: Tensor, weight: Weight, channels: Tensor | None = None) -> Tensor:
    """``values`` (k, length), zeroed in place where :func:`nonzero` is false; returned.

    Raises:
        ValueError: the weight's format has no code for zero.
    """
    stored = unpack(weight)
    if use_triton(values):
        from .gpu import masked

        if masked.takes(values, stored):
            return masked.keep_nonzero(values, stored, channels)
    step = max(1, (_GPU_CHUNK if values.is_cuda else _CHUNK) // max(1, stored.length))
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
    if not (stored.nf4 or stored.layout[0] == FLOATS):
        raise ValueError(
            "a matrix in a format of levels (hqq, bcq, shiftadd, billm) has no code for zero, so that nothing tells what is "
            'pruned: set quantization.format "nf4" or "fp8", or leave it out'
        )
    bits = 4 if stored.nf4 else stored.layout[2]
    found = _kept(bits, stored.nf4, rows.device, dtype).index_select(0, rows.reshape(-1).int())
    return found.view(rows.shape[0], rows.shape[1] * found.shape[1])[:, : stored.length]


@cache
def _kept(bits: int, nf4: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each byte of codes, whether its values are not zero: (256, 2 or 1)."""
    kept = (levels(device) if nf4 else code_values(bits, device)) != 0
    if bits == 8:
        return kept.to(dtype)[:, None]
    byte = torch.arange(256, device=device)
    halves = [kept[byte & 15], kept[byte >> 4]]
    return torch.stack(halves[::-1] if nf4 else halves, 1).to(dtype)
