"""Channel scores from low-rank factors: sums over tokens of squared, estimated activations, in fp32.

    projection_score    s_j = Σ_t (B A x_t)_j²                                   (out,)
    gated_ffn_score     s_j = Σ_t [ act((B_g A_g x_t)_j) · (B_u A_u x_t)_j ]²     (I,)

with ``A`` (r, in) and ``B`` (out, r), ``W ≈ B·A``. A tensor of tokens × channels is never written: a linear
projection needs only the r × r Gram matrix of ``A x`` (``Σ_t (b·p_t)² = bᵀ (Σ_t p_t p_tᵀ) b``), and the gated FFN is
summed in blocks of tokens. The blocks are summed in a fixed order, so that the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Tokens per block of the FFN score: 64 × 4096 channels × 4 bytes is 1 MiB, which stays in a core's L2 cache.
_TOKEN_BLOCK = 64


def _without_autocast(x: Tensor) -> torch.autocast:
    """Autocast would round the fp32 sums to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def projection_score(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ over ``rows`` of (B A x)².

    Args:
        x: (T, in), any floating dtype.
        rows: int64 rows of ``x`` to sum over; may be empty, then the result is zero.
        a: (r, in); b: (out, r).

    Returns:
        (out,) fp32.
    """
    with _without_autocast(x):
        p = torch.nn.functional.linear(x, a.to(x.dtype)).index_select(0, rows).float()
        b = b.float()
        return ((b @ (p.t() @ p)) * b).sum(1).clamp_min_(0.0)


def gated_ffn_score(
    x: Tensor,
    rows: Tensor,
    gate: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Σ over ``rows`` of [act(B_g A_g x) · (B_u A_u x)]².

    Args:
        x: (T, H), any floating dtype.
        rows: int64 rows of ``x`` to sum over; may be empty, then the result is zero.
        gate, up: factors ``(A, B)``, (r, H) and (I, r).
        activation: the FFN's elementwise activation.

    Returns:
        (I,) fp32.
    """
    (gate_a, gate_b), (up_a, up_b) = gate, up
    with _without_autocast(x):
        p = torch.nn.functional.linear(x, torch.cat([gate_a, up_a]).to(x.dtype)).index_select(0, rows).float()
        p_gate, p_up = p[:, : gate_a.shape[0]], p[:, gate_a.shape[0] :]
        gate_bt, up_bt = gate_b.float().t(), up_b.float().t()
        scores = p.new_zeros(gate_b.shape[0])
        for start in range(0, p.shape[0], _TOKEN_BLOCK):
            block = slice(start, start + _TOKEN_BLOCK)
            hidden = activation(p_gate[block] @ gate_bt).mul_(p_up[block] @ up_bt)
            scores += hidden.square_().sum(0)
        return scores
