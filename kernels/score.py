"""Channel scores from low-rank factors: sums over tokens of squared, estimated activations, in fp32.

    projection_score    s_j = Σ_t (B A x_t)_j²                                   (out,)
    gated_ffn_score     s_j = Σ_t [ act((B_g A_g x_t)_j) · (B_u A_u x_t)_j ]²     (I,)
    ffn_score           s_j = Σ_t act((B A x_t)_j + b_j)²                         (I,)

with ``A`` (r, in) and ``B`` (out, r), ``W ≈ B·A``. A tensor of tokens × channels is never written. On the CPU a linear
projection needs only the r × r Gram matrix of ``A x`` (``Σ_t (b·p_t)² = bᵀ (Σ_t p_t p_tᵀ) b``), and the gated FFN is
summed in blocks of tokens; on a GPU both are sums of tiles (:mod:`sparselora_kernels.gpu.score`). Every sum has a fixed
order, so that repeated runs agree to the bit. Scores carry no gradient.

The operators ``sparselora::projection_scores`` and ``sparselora::gated_ffn_score`` read ``x`` once for all factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .activations import activate, activation_name, check_activation
from .backend import use_triton
from .operator import register

Factors = tuple[Tensor, Tensor]
"""``A`` (r, in) and ``B`` (out, r)."""

# Tokens per block of the FFN score: 64 × 4096 channels × 4 bytes is 1 MiB, which stays in a core's L2 cache.
_TOKEN_BLOCK = 64
# On a GPU launches count: 2048 × 16384 channels × 4 bytes is 128 MiB.
_GPU_BLOCK = 2048


def projection_scores(x: Tensor, rows: Tensor, factors: Sequence[Factors]) -> list[Tensor]:
    """:func:`projection_score` of several projections of one ``x``, which is read once: (out_i,) fp32 each."""
    a, b = [pair[0].detach() for pair in factors], [pair[1].detach() for pair in factors]
    scores = _run_projections(x.detach(), rows, a, b)
    return list(scores.split([factor.shape[0] for factor in b]))


def projection_score(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ over ``rows`` of (B A x)².

    Args:
        x: (T, in), any floating dtype.
        rows: int64 rows of ``x`` to sum over; may be empty, then the result is zero.
        a: (r, in); b: (out, r).

    Returns:
        (out,) fp32.
    """
    return projection_scores(x, rows, [(a, b)])[0]


def gated_ffn_score(
    x: Tensor, rows: Tensor, gate: Factors, up: Factors, activation: str | Callable[[Tensor], Tensor]
) -> Tensor:
    """Σ over ``rows`` of [act(B_g A_g x) · (B_u A_u x)]².

    Args:
        x: (T, H), any floating dtype.
        rows: int64 rows of ``x`` to sum over; may be empty, then the result is zero.
        gate, up: factors ``(A, B)``, (r, H) and (I, r).
        activation: the FFN's elementwise activation, by name or as a function. One without a name in
            :mod:`sparselora_kernels.activations` is computed by torch on every device.

    Returns:
        (I,) fp32.

    Raises:
        ValueError: no activation has this name.
    """
    name = activation if isinstance(activation, str) else activation_name(activation)
    with torch.no_grad():
        if name is None:
            assert callable(activation)
            return _gated_blocks(x, rows, gate, up, activation)
        return _run_gated_ffn(x, rows, *gate, *up, name)


def ffn_score(
    x: Tensor, rows: Tensor, up: Factors, activation: Callable[[Tensor], Tensor], bias: Tensor | None = None
) -> Tensor:
    """Σ over ``rows`` of act(B A x + b)², of an FFN without a gate.

    This score is ours: the authors' code knows gated FFNs only. It is computed by torch on every device, because the
    activation may be any module, with parameters of its own.

    Args:
        x: (T, H), any floating dtype.
        rows: int64 rows of ``x`` to sum over; may be empty, then the result is zero.
        up: factors ``(A, B)``, (r, H) and (I, r).
        activation: elementwise; called with (tokens, I) fp32.
        bias: (I,). It decides on which side of the activation's bend a neuron is.

    Returns:
        (I,) fp32.
    """
    step = _TOKEN_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    with torch.no_grad(), _without_autocast(x):
        (p,) = _low(x, rows, up[:1])
        bt = up[1].float().t()
        shift = bt.new_zeros(bt.shape[1]) if bias is None else bias.float()
        scores = torch.zeros_like(shift)
        for start in range(0, rows.shape[0], step):
            scores += activation(torch.addmm(shift, p[start : start + step], bt)).square().sum(0)
        return scores


# --- operators --------------------------------------------------------------------------------------------------------


def _projection_scores(x: Tensor, rows: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    with _without_autocast(x):
        if use_triton(x):
            from .gpu import score

            with torch.cuda.device_of(x):
                return score.projection_scores(x, rows, a, b)
        return _projection_grams(x, rows, a, b)


def _projection_scores_fake(x: Tensor, rows: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    return x.new_empty(sum(factor.shape[0] for factor in b), dtype=torch.float32)


_run_projections = register("projection_scores", _projection_scores, _projection_scores_fake)


def _gated_ffn_score(
    x: Tensor, rows: Tensor, gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor, activation: str
) -> Tensor:
    gate, up = (gate_a, gate_b), (up_a, up_b)
    check_activation(activation)
    if use_triton(x):
        from .gpu import score

        with _without_autocast(x), torch.cuda.device_of(x):
            return score.gated_ffn_score(x, rows, gate, up, activation)
    return _gated_blocks(x, rows, gate, up, partial(activate, activation))


def _gated_ffn_score_fake(x: Tensor, rows: Tensor, gate_a: Tensor, gate_b: Tensor, *_: Any) -> Tensor:
    return x.new_empty(gate_b.shape[0], dtype=torch.float32)


_run_gated_ffn = register("gated_ffn_score", _gated_ffn_score, _gated_ffn_score_fake)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _without_autocast(x: Tensor) -> torch.autocast:
    """Autocast would round the fp32 sums to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def _low(x: Tensor, rows: Tensor, a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``A x`` of the rows for each ``A``, fp32: one read of ``x``, and no copy of its rows."""
    p = torch.nn.functional.linear(x, torch.cat(list(a)).to(x.dtype)).index_select(0, rows).float()
    return p.split([factor.shape[0] for factor in a], 1)


def _projection_grams(x: Tensor, rows: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    scores = []
    for p, factor in zip(_low(x, rows, a), b):
        factor = factor.float()
        scores.append(((factor @ (p.t() @ p)) * factor).sum(1).clamp_min_(0.0))
    return torch.cat(scores)


def _gated_blocks(
    x: Tensor, rows: Tensor, gate: Factors, up: Factors, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    with _without_autocast(x):
        p_gate, p_up = _low(x, rows, (gate[0], up[0]))
        gate_bt, up_bt = gate[1].float().t(), up[1].float().t()
        scores = p_gate.new_zeros(gate_bt.shape[1])
        for start in range(0, rows.shape[0], _TOKEN_BLOCK):
            block = slice(start, start + _TOKEN_BLOCK)
            hidden = activation(p_gate[block] @ gate_bt).mul_(p_up[block] @ up_bt)
            scores += hidden.square_().sum(0)
        return scores
