"""Gradients of the factors of a masked adapter, from what meets in the gradient of the stored matrix.

    exact                  G = s·(IᵀO) ⊙ (R ≠ 0)       dP = G·Qᵀ                 dQ = Pᵀ·G
    straight-through                                   dP = s·Iᵀ(O·Qᵀ)           dQ = s·(I·P)ᵀO

``R`` (C, length) is the matrix as it is stored, ``Ŵ = (R + s·P·Q) ⊙ (R ≠ 0)``; ``I`` (n, C) are inner and ``O`` (n, length)
outer values of tokens: output gradients and inputs, or the other way round where columns are stored as rows. The second is
LoRS' (arXiv 2501.08582) with the factor ``s``, which its code leaves out: Adam does not see that, clipping does. Without the
mask both are plain LoRA's, and the cheaper order is taken (:func:`~.lora_linear.lora_order`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .indexed_linear import linear
from .lora_linear import lora_order, scaled_product
from .nonzero import keep_nonzero
from .stored import EncodedWeight

Pair = tuple[Tensor, Tensor, "Tensor | None"]
"""Inner (n, C) or (n, k), outer (n, length), and the channels (k,) that the inner ones are of; ``None`` for all."""


def factor_gradients(
    weight: EncodedWeight, pairs: Iterable[Pair], p: Tensor, q: Tensor, scaling: float, straight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``P`` (C, r) and ``Q`` (r, length), summed over the pairs, of which one ``G`` is there at a time."""
    grad_p, grad_q = torch.zeros_like(p), torch.zeros_like(q)
    for inner, outer, channels in pairs:
        if not inner.shape[0]:
            continue
        rows = p if channels is None else p.index_select(0, channels)
        _, order = lora_order(inner.shape[0], outer.shape[1], inner.shape[1], p.shape[1])
        if straight and order == "through_rank":
            of_rows = scaled_product(inner.t(), linear(outer, q), scaling)
            grad_q.addmm_((inner @ rows).t(), outer, alpha=scaling)
        else:
            update = scaled_product(inner.t(), outer, scaling)
            if not straight:
                keep_nonzero(update, weight, channels)
            of_rows = update @ q.t()
            grad_q.addmm_(rows.t(), update)
            del update
        if channels is None:
            grad_p += of_rows
        else:
            grad_p.index_add_(0, channels, of_rows)
    return grad_p, grad_q
