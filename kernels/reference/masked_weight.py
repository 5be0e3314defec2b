"""Reference of ``kernels/masked_weight.py``: the formula, differentiable by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .nonzero import nonzero


class _PassThrough(torch.autograd.Function):
    """``values ⊙ mask``, whose gradient LoRS takes for that of ``values``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor) -> Tensor:
        return values * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def masked_weight(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool = False, gradient: str = "exact"
) -> Tensor:
    """``(W + s·B·A) ⊙ (W ≠ 0)``, laid out as ``weight`` is: (out, in), or (in, out) when ``transposed``."""
    update = scaling * (b @ a)
    whole, mask = weight + (update.t() if transposed else update), nonzero(weight).to(weight.dtype)
    return whole * mask if gradient == "exact" else _PassThrough.apply(whole, mask)
