"""Sparsity estimator: rank-r factors of a frozen matrix, ``W ≈ B·A``, from a truncated SVD (SparseLoRA, section 3.2).

Training-free. The singular values are split evenly: ``A = √Σ_r Vᵀ_r`` (r, in), ``B = U_r √Σ_r`` (out, r).

With the inputs' second moment ``M = E[x xᵀ]`` the truncation minimises the error of what is estimated,
``E‖Wx − BAx‖² = ‖(W − BA) M^½‖²``, in place of ``‖W − BA‖²``: with ``W M^½ = U Σ Vᵀ`` the best of rank r is the projection
``U_r U_rᵀ W``, so ``B = U_r`` and ``A = U_rᵀ W``. Same shapes, same cost in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Above this smaller side a full SVD takes seconds to minutes and the randomised one takes its place.
EXACT_SVD_SIDE = 1024
# Randomised SVD (Halko et al. 2011): extra directions and power iterations. With these the kept channels of a trained
# 1024 × 2816 matrix agree with the exact factors' (tests/method/test_estimator.py).
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def low_rank_factors(
    weight: Tensor,
    rank: int,
    *,
    seed: int = 0,
    exact: bool | None = None,
    second_moment: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors ``(A, B)`` of ``weight``, on its device and in its dtype.

    Args:
        weight: (out, in), any floating dtype; decomposed in fp32, and fp64 in fp64.
        rank: at least 1; cut to ``min(out, in)``.
        seed: of the randomised SVD; the caller's random state is left alone.
        exact: full SVD or randomised; by default decided by the matrix's smaller side.
        second_moment: (in, in), ``E[x xᵀ]`` of the inputs up to a factor; it need not be invertible. ``None`` weighs all
            directions alike.
        seen: (out, in), ``weight·R`` of a root R of that moment, ``M = R Rᵀ``, where it is at hand.

    Returns:
        ``A`` (r, in) and ``B`` (out, r), contiguous.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    rank = min(rank, *weight.shape)
    w = plain = weight.detach() if weight.dtype is torch.float64 else weight.detach().float()
    if second_moment is not None:
        if second_moment.shape != (w.shape[1], w.shape[1]):
            raise ValueError(f"second_moment of a {tuple(w.shape)} matrix is {tuple(second_moment.shape)}")
        # Any root R of the moment, M = R Rᵀ, gives the same U; in fp64, because its eigenvalues span many decades.
        values, vectors = torch.linalg.eigh(second_moment.to(w.device).double())
        seen = w @ (vectors * values.clamp_min(0).sqrt()).to(w.dtype)
    w = w if seen is None else seen
    if exact is None:
        exact = min(w.shape) <= EXACT_SVD_SIDE or rank + _OVERSAMPLING > min(w.shape)
    if exact:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        devices = [w.device] if w.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        vt = v.t()
    if seen is not None:
        basis = u[:, :rank]
        return (basis.t() @ plain).to(weight.dtype).contiguous(), basis.to(weight.dtype).contiguous()
    root = s[:rank].sqrt()
    a = root[:, None] * vt[:rank]
    b = u[:, :rank] * root
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
