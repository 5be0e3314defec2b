"""Reference of ``kernels/ffn_up.py``: the whole product, of which context tokens keep some neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from .gated_ffn import plain_linear


def ffn_up(
    x: Tensor,
    weight: Tensor,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.ffn_up`."""
    y = plain_linear(x, weight, bias, low, b)
    return torch.cat([y[dense_rows].flatten(), y[context_rows][:, channels].flatten()])
