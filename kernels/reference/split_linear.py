"""Reference of ``kernels/split_linear.py``: two plain products."""

from __future__ import annotations

from torch import Tensor

from .indexed_linear import indexed_linear


def split_linear(
    x_dense: Tensor,
    x_context: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: Tensor,
    *,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`sparselora_kernels.split_linear`."""
    dense = indexed_linear(x_dense, weight, bias, transposed=transposed)
    return dense, indexed_linear(x_context, weight, bias, channels, transposed=transposed)
