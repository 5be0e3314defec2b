"""Reference of ``kernels/indexed_linear.py``: plain indexing around a whole product."""

from __future__ import annotations

import torch
from torch import Tensor


def indexed_nt(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    channels: Tensor | None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See :func:`sparselora_kernels.indexed_linear.indexed_nt`; a new tensor where ``out`` would be written."""
    rows = torch.arange(x.shape[0]) if rows is None else rows
    channels = torch.arange(weight.shape[0]) if channels is None else channels
    y = x @ weight.t() if bias is None else x @ weight.t() + bias
    y = y[rows][:, channels]
    if out is None:
        return y
    result = out.clone()
    result[rows[:, None], channels] = y + out[rows[:, None], channels] if accumulate else y
    return result


def indexed_nn(
    h: Tensor,
    weight: Tensor,
    rows: Tensor,
    channels: Tensor | None,
    out: Tensor,
    *,
    indexed: bool = False,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See :func:`sparselora_kernels.indexed_linear.indexed_nn`; a new tensor where ``out`` would be written."""
    channels = torch.arange(weight.shape[0]) if channels is None else channels
    y = (h[rows][:, channels] if indexed else h) @ weight[channels]
    if bias is not None:
        y = y + bias
    if low is not None and b is not None:
        y = y + low @ b.t()
    result = out.clone()
    result[rows] = y + out[rows] if accumulate else y
    return result
