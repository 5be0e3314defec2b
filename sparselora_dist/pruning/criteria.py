"""What a weight is worth, by the published formulas. All in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..layerwise.statistics import Statistic
from .pattern import Pattern, Scope, smallest
from .sparsegpt import sparsegpt


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prune a matrix.

    ``prune(weight (out, in) fp32, statistic, tokens, pattern)`` gives the weight with zeros, (out, in) fp32.
    """

    statistic: Statistic
    prune: Callable[[Tensor, Tensor | None, int, Pattern], Tensor]
    source: str


def magnitude(weight: Tensor) -> Tensor:
    """|W|."""
    return weight.abs()


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Sun et al. 2023, eq. 1); chosen row by row."""
    return weight.abs() * squares.sqrt()


def ria(weight: Tensor, squares: Tensor) -> Tensor:
    """(|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^½ (Zhang et al. 2024, eq. 3, a = 0.5); over the matrix."""
    size = weight.abs()
    # A row or column of zeros is worth nothing, and not 0/0.
    tiny = 1e-30
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * squares.pow(0.25)


def _by(score: Callable[..., Tensor], scope: Scope) -> Callable[[Tensor, Tensor | None, int, Pattern], Tensor]:
    def prune(weight: Tensor, statistic: Tensor | None, tokens: int, pattern: Pattern) -> Tensor:
        scores = score(weight) if statistic is None else score(weight, statistic)
        return weight.masked_fill(smallest(scores, pattern, scope), 0.0)

    return prune


def _sparsegpt(weight: Tensor, statistic: Tensor | None, tokens: int, pattern: Pattern) -> Tensor:
    assert statistic is not None
    return sparsegpt(weight, statistic * (2.0 / tokens), pattern)


METHODS = {
    "magnitude": Method("", _by(magnitude, "matrix"), "the smallest of a matrix"),
    "wanda": Method("squares", _by(wanda, "row"), "Sun et al. 2023, arXiv 2306.11695"),
    "ria": Method("squares", _by(ria, "matrix"), "Zhang et al. 2024, Plug-and-Play"),
    "sparsegpt": Method("products", _sparsegpt, "Frantar and Alistarh 2023, arXiv 2301.00774"),
}
