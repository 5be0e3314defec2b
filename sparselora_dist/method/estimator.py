"""Sparsity estimator: rank-r factors of a frozen matrix, ``W ≈ B·A``, from a truncated SVD (SparseLoRA, section 3.2).

Training-free. The singular values are split evenly: ``A = √Σ_r Vᵀ_r`` (r, in), ``B = U_r √Σ_r`` (out, r).
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


def low_rank_factors(weight: Tensor, rank: int, *, seed: int = 0, exact: bool | None = None) -> tuple[Tensor, Tensor]:
    """Factors ``(A, B)`` of ``weight``, on its device and in its dtype.

    Args:
        weight: (out, in), any floating dtype; decomposed in fp32.
        rank: at least 1; cut to ``min(out, in)``.
        seed: of the randomised SVD; the caller's random state is left alone.
        exact: full SVD or randomised; by default decided by the matrix's smaller side.

    Returns:
        ``A`` (r, in) and ``B`` (out, r), contiguous.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    rank = min(rank, *weight.shape)
    w = weight.detach().float()
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
    root = s[:rank].sqrt()
    a = root[:, None] * vt[:rank]
    b = u[:, :rank] * root
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
