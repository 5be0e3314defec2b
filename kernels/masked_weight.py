"""The weight of a masked adapter: the one matrix of its size that a product needs.

    Ŵ = (W + s·B·A) ⊙ (W ≠ 0)

(SP-LoRA; LoRS, arXiv 2501.08582.) It lives for one product, is never kept, and has no zeros stored beside it. It is rounded
to the dtype of the computation, as a merged model of that dtype is: what is trained is what is merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import use_triton
from .nonzero import keep_nonzero
from .stored import Weight, unpack


def masked_weight(weight: Weight, p: Tensor, q: Tensor, scaling: float) -> Tensor:
    """``(R + s·P·Q) ⊙ (R ≠ 0)`` of a stored matrix ``R`` (C, length), in the dtype of the factors.

    Args:
        weight: ``W`` as it is stored, or (down, o) transposed.
        p, q: (C, r) and (r, length): ``B`` and ``A``, or ``Aᵀ`` and ``Bᵀ`` where it is transposed.
        scaling: ``s``.

    Returns:
        (C, length); the only memory of that size that is taken.
    """
    stored = unpack(weight)
    base = stored.decode(None, p.dtype)
    if use_triton(p):
        from .gpu import masked

        if masked.takes(base, stored):
            return masked.masked_weight(base, stored, p, q, scaling)
    own = base.data_ptr() == stored.parts[0].data_ptr()
    whole = torch.addmm(base, p, q, alpha=scaling) if own else base.addmm_(p, q, alpha=scaling)
    return keep_nonzero(whole, stored)
