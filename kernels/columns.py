"""Chosen columns of chosen rows, copied out once and put back once.

    gather     Y = X[rows][:, channels]                                  (n, k)
    scatter    out[rows[:, None], channels]  (+)=  Y

A product with columns by index would load two bytes at a time, and again in every tile of its other side. One copy of
the kept values makes it a compact product, whose loads are wide. Each value belongs to one program: nothing is added
atomically, and repeated runs are bit-identical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton
from .reference import columns as reference

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gather(x: Tensor, rows: Tensor, channels: Tensor) -> Tensor:
    """``x[rows][:, channels]`` of ``x`` (T, C), (n,) and (k,) int64: (n, k)."""
    if use_triton(x) and x.dtype in _KERNEL_DTYPES:
        from .gpu import columns

        return columns.gather(x, rows, channels)
    return reference.gather(x, rows, channels)


def scatter(y: Tensor, rows: Tensor, channels: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """``out[rows[:, None], channels] = y``, or added there in fp32 and rounded; ``out`` (T, C), which is returned.

    Args:
        y: (n, k) in the dtype of ``out``.
        rows, channels: (n,) and (k,) int64, each number at most once.
    """
    if use_triton(out) and out.dtype in _KERNEL_DTYPES:
        from .gpu import columns

        return columns.scatter(y, rows, channels, out, accumulate)
    return reference.scatter(y, rows, channels, out, accumulate)
