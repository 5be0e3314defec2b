"""How many weights go, and among which they are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["row", "matrix"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A share of all weights, or N kept of every M that lie side by side in a row.

    N is what is *kept* (NVIDIA's sense). The code of Wanda and SparseGPT counts the zeros: the same at 2:4, not at 1:4.
    """

    sparsity: float
    """Share of zeros."""
    of: int = 0
    """M, or 0 for any places."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``"2:4"``.

        Raises:
            ValueError: not N:M with 0 < N < M.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text)
        keep, of = map(int, found.groups()) if found else (0, 0)
        if not 0 < keep < of:
            raise ValueError(f"pattern is {text!r}: allowed: N:M, N kept of every M, such as 2:4 or 4:8")
        return cls(1 - keep / of, of)

    @classmethod
    def share(cls, sparsity: float) -> Pattern:
        """Any places.

        Raises:
            ValueError: not between 0 and 1.
        """
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity is {sparsity}: allowed: numbers between 0 and 1, such as 0.5")
        return cls(sparsity)

    def zeros(self, count: int) -> int:
        """How many of ``count`` weights go."""
        # 0.3 * 10 is a little below 3.
        return int(count * self.sparsity + 1e-9)

    def check(self, in_features: int, name: str) -> None:
        """Raises ValueError where groups do not divide the rows of a matrix."""
        if self.of and in_features % self.of:
            raise ValueError(
                f"pattern {self}: the rows of {name} have {in_features} weights, which groups of {self.of} do not divide; "
                f"choose a pattern that does, or --sparsity {self.sparsity:g}"
            )

    def __str__(self) -> str:
        return f"{round(self.of * (1 - self.sparsity))}:{self.of}" if self.of else f"{self.sparsity:g}"


def smallest(scores: Tensor, pattern: Pattern, scope: Scope) -> Tensor:
    """Where the smallest scores are, (out, in) bool: as many of each group, of each row or of the matrix as the pattern
    says. Of equal scores the first go.

    Args:
        scores: (out, in), finite.
        pattern: a pattern of groups is always chosen group by group.
        scope: what a share is a share of.
    """
    width = pattern.of or (scores.shape[1] if scope == "row" else scores.numel())
    groups = scores.reshape(-1, width)
    order = groups.sort(dim=1, stable=True).indices[:, : pattern.zeros(width)]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)
