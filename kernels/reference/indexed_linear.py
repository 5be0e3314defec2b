"""Reference of ``kernels/indexed_linear.py``: plain indexing around a whole product with the values of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import NNOperands, NTOperands


def indexed_nt(operands: NTOperands, weight: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.indexed_linear.indexed_nt`."""
    x, rows, channels, bias = operands
    rows = torch.arange(x.shape[0]) if rows is None else rows
    channels = torch.arange(weight.shape[0]) if channels is None else channels
    y = x @ weight.t() if bias is None else x @ weight.t() + bias
    return y[rows][:, channels]


def indexed_nn(operands: NNOperands, weight: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.indexed_linear.indexed_nn`; a new tensor where ``out`` would be written."""
    h, rows, channels, out, bias, low, b, accumulate = operands
    rows = torch.arange(out.shape[0]) if rows is None else rows
    channels = torch.arange(weight.shape[0]) if channels is None else channels
    y = h @ weight[channels]
    if bias is not None:
        y = y + bias
    if low is not None and b is not None:
        y = y + low @ b.t()
    result = out.clone()
    result[rows] = y + out[rows] if accumulate else y
    return result
