"""Reference of ``kernels/gated_product.py``."""

from __future__ import annotations

from torch import Tensor

from ..activations import activate


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See :func:`sparselora_kernels.gated_product`."""
    return activate(activation, gate) * up
