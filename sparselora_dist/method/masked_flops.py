"""What adapters that keep the zeros of a pruned base cost beside plain LoRA, in FLOPs.

Forward and backward of T tokens, K in, N out, rank r:

    plain LoRA          4·T·N·K + 6·T·r·(N + K)
    exact               6·T·N·K + 8·N·K·r              B·A twice; A's and B's gradients follow from the matrix'
    straight-through    4·T·N·K + 4·N·K·r + 4·T·r·(N + K)

The terms without T come once for every micro-batch of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_GROUP = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo", "gate_up_proj": "ffn"}
_GROUP |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "ffn")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedMatrix:
    """A matrix whose adapter is masked."""

    layer: int
    name: str
    """``q_proj`` ... ``down_proj``, or another; it says whose kept channels a context token takes."""
    rows: int
    """N."""
    columns: int
    """K."""
    rank: int

    def share(self, layers: Sequence[Any]) -> float:
        """Of its elements that a context token meets, with these kept shares."""
        group = _GROUP.get(self.name)
        return getattr(layers[self.layer], group) if group else 1.0


@dataclass(frozen=True, slots=True)
class MaskedWork:
    """All of a model's."""

    matrices: tuple[MaskedMatrix, ...]
    gradient: str
    """``"exact"`` or ``"straight_through"``."""

    def extra(self, tokens: MaskedTokens, forward_only: bool = False) -> float:
        """FLOPs of a step above what plain LoRA takes, below zero where they are fewer; ``forward_only`` of one forward."""
        total = 0.0
        for one in self.matrices:
            dense, context = tokens.of(one)
            met = dense + context * one.share(tokens.layers)
            elements, branch = one.rows * one.columns, one.rank * (one.rows + one.columns) * (dense + context)
            if forward_only:
                total += 2 * elements * one.rank * tokens.products - 2 * branch
            elif self.gradient == "exact":
                total += 2 * elements * met + 8 * elements * one.rank * tokens.products - 6 * branch
            else:
                total += 4 * elements * one.rank * tokens.products - 2 * branch
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens:
    """What is computed with the matrices."""

    layers: Sequence[Any]
    """Kept shares of every layer."""
    dense: float
    context: float
    labels: float | None
    """Positions that the last layer runs the matrices of ``trimmed`` at; None: at all of them."""
    trimmed: tuple[str, ...]
    products: int
    """Micro-batches, of all ranks whose tokens these are."""

    def of(self, one: MaskedMatrix) -> tuple[float, float]:
        """Dense and context tokens of one matrix."""
        if self.labels is not None and one.layer == len(self.layers) - 1 and one.name in self.trimmed:
            return self.labels, 0.0
        return self.dense, self.context
