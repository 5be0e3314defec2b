"""Reference of ``kernels/grouped.py``: row by row, each with its expert's matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def owner(row: int, ends: Tensor) -> int:
    return next(expert for expert, end in enumerate(ends.tolist()) if row < end)


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, channels: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """See :func:`sparselora_kernels.grouped_linear`."""
    rows = weight if channels is None else weight[channels]
    own = rows.chunk(len(ends))
    found = [x[s] @ (own[owner(s, ends)] if transposed else own[owner(s, ends)].t()) for s in range(len(x))]
    return torch.stack(found) if found else x @ (own[0] if transposed else own[0].t())


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.grouped_product`."""
    return grouped_linear(x, weight.flatten(0, 1), ends)
