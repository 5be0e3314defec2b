"""Reference of ``kernels/masked_linear.py``: autograd of the formula, with a mask that is there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ffn_down import ffn_down
from .ffn_up import ffn_up
from .lora_linear import lora_linear
from .masked_weight import masked_weight


def masked_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gradient: str = "exact",
    **lists: Any,
) -> Tensor:
    """See :func:`sparselora_kernels.masked_linear`."""
    own = masked_weight(weight, a, b, scaling, transposed, gradient)
    return lora_linear(x, own, bias, transposed=transposed, **lists)


def masked_up(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, *lists: Tensor, bias: Tensor | None = None,
    gradient: str = "exact",
) -> Tensor:  # fmt: skip
    """See :func:`sparselora_kernels.masked_up`."""
    return ffn_up(x, masked_weight(weight, a, b, scaling, False, gradient), *lists, bias=bias)


def masked_down(
    h_dense: Tensor, h_context: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, *lists: Any,
    bias: Tensor | None = None, gradient: str = "exact",
) -> Tensor:  # fmt: skip
    """See :func:`sparselora_kernels.masked_down`."""
    return ffn_down(h_dense, h_context, masked_weight(weight, a, b, scaling, True, gradient), *lists, bias=bias)
