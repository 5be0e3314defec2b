"""Reference of ``kernels/lora_linear.py``: whole products, with what is not kept set to zero."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dense_rows: Tensor | None = None,
    context_rows: Tensor | None = None,
    channels: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """See :func:`sparselora_kernels.lora_linear`."""
    computed = torch.ones(x.shape[0], 1, dtype=x.dtype)
    kept = torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype)
    if dense_rows is not None and context_rows is not None and channels is not None:
        computed.zero_()
        computed[dense_rows] = computed[context_rows] = 1
        kept[context_rows] = 0
        kept[context_rows[:, None], channels] = 1
    y = (x * kept) @ weight if transposed else x @ weight.t()
    if bias is not None:
        y = y + bias
    y = y * (computed if transposed else computed * kept)
    return y if a is None or b is None else y + scaling * (x @ a.t()) @ b.t()
