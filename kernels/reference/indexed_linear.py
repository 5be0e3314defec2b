"""Reference of ``kernels/indexed_linear.py``: the whole product, with what is not kept set to zero."""

from __future__ import annotations

import torch
from torch import Tensor


def indexed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, channels: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """See :func:`sparselora_kernels.indexed_linear`."""
    if channels is None:
        channels = torch.arange(weight.shape[0])
    if transposed:
        whole = x.new_zeros(x.shape[0], weight.shape[0]).index_add(1, channels, x)
        y = whole @ weight
        return y if bias is None else y + bias
    y = x @ weight.t()
    return (y if bias is None else y + bias)[:, channels]


def indexed_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """See :func:`sparselora_kernels.indexed_projection`."""
    computed = torch.zeros(x.shape[0], 1, dtype=x.dtype)
    computed[dense_rows] = computed[context_rows] = 1
    kept = torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype)
    kept[context_rows] = 0
    kept[context_rows[:, None], channels] = 1
    y = (x * kept) @ weight if transposed else x @ weight.t()
    if bias is not None:
        y = y + bias
    return y * (computed if transposed else computed * kept)
