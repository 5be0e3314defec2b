"""How many zeros each layer takes (LoSA, Huang et al. 2025, arXiv 2502.14816, eq. 5): a linear programme.

    minimise Σ w_i·s_i·p_i    with    Σ w_i·s_i = s·Σ w_i,    |s_i − s| ≤ δ,    p_i = exp(−β·c_i / Σc)

One equality and boxes: an optimum fills the layers from the smallest p_i on, so that sorting finds it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BETA = {"sparsegpt": 100.0}
"""β by method; 1 of the others."""


def leeway(sparsity: float) -> float:
    """δ by the mean sparsity: 0.01 up to 50 %, 0.02 up to 60 %, 0.03 above."""
    return 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03


def importance(alike: Sequence[float], beta: float) -> list[float]:
    """p_i: small where a layer's inputs are like the other layers'.

    Args:
        alike: c_i, the sum of its inputs' CKA with the other layers'.
        beta: how much that counts.
    """
    total = sum(alike)
    return [math.exp(-beta * one / total) for one in alike]


def layer_shares(importance: Sequence[float], sparsity: float, delta: float, weights: Sequence[int]) -> list[float]:
    """The sparsity of each layer; of equally important layers the first take more.

    Args:
        importance: p_i.
        sparsity: s, the share of zeros of all layers together.
        delta: δ; the bounds stay between 0 and 1 whatever it is.
        weights: w_i, the parameters of each layer.
    """
    # As far as an equal distance goes on both sides.
    delta = min(delta, sparsity, 1 - sparsity)
    shares = [sparsity - delta] * len(weights)
    left = delta * sum(weights)
    for layer in sorted(range(len(weights)), key=lambda layer: importance[layer]):
        more = min(2 * delta, left / weights[layer])
        shares[layer] += more
        left = max(left - more * weights[layer], 0.0)
    return shares


def round_sparsity(sparsity: float, number: int, rounds: int) -> float:
    """s_t = s − s·(1 − t/T)³ of round t = 1 … T: nearly half in the first of five, and slower and slower."""
    return sparsity - sparsity * (1 - number / rounds) ** 3
