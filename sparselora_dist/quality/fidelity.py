"""How well the estimator chooses channels: against the exact activations, and against a random choice.

    exact       score_j of the activations that the frozen matrices really give (bias left out, as in the estimate)
    recall      |kept by X ∩ kept by exact| / k
    energy      Σ_{j kept by X} exact score_j / Σ_j exact score_j
    overlap     |kept in A ∩ kept in B| / k, of two batches or of two ranks

Functions on tensors. A site's scores come from sums over tokens that add up over batches and ranks; ``qk`` has two of
them (queries, keys) whose product is the score, ``ffn`` and ``vo`` have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparselora_kernels import ffn_score, gated_ffn_score, projection_scores, select_channels, select_grouped

from ..method.channels import HeadGeometry

Factors = tuple[Tensor, Tensor]
"""``A`` (r, in) and ``B`` (out, r)."""
Activation = Callable[[Tensor], Tensor]

RANDOM, EXACT = "random", "exact"


# --- scores -----------------------------------------------------------------------------------------------------------


def exact_sums(
    group: str, outputs: Mapping[str, Tensor], rows: Tensor, heads: HeadGeometry, activation: Activation
) -> Tensor:
    """Sums over ``rows`` of squared exact activations, fp32.

    Args:
        group: ``ffn``, ``qk`` or ``vo``.
        outputs: by matrix name (``gate_proj`` and ``up_proj``, or ``up_proj`` alone without a gate; ``q_proj`` and
            ``k_proj``; ``v_proj``), (T, out).
        rows: int64 rows of the outputs.

    Returns:
        (1, n), or (2, n) for ``qk``: queries, keys.
    """
    taken = {name: output.index_select(0, rows).float() for name, output in outputs.items()}
    if group == "ffn":
        if "gate_proj" not in taken:
            return activation(taken["up_proj"]).square().sum(0)[None]
        return (activation(taken["gate_proj"]) * taken["up_proj"]).square().sum(0)[None]
    sums = {name: output.square().sum(0) for name, output in taken.items()}
    return _attention(group, sums, heads)


def estimated_sums(
    group: str,
    x: Tensor,
    rows: Tensor,
    factors: Mapping[str, Factors],
    heads: HeadGeometry,
    activation: Activation,
    bias: Tensor | None = None,
) -> Tensor:
    """The same from the layer's input ``x`` (T, in) and low-rank factors by matrix name, as training computes it.

    ``bias`` is that of up in an FFN without a gate.
    """
    if group == "ffn" and "gate_proj" not in factors:
        return ffn_score(x, rows, factors["up_proj"], activation, bias)[None]
    if group == "ffn":
        return gated_ffn_score(x, rows, factors["gate_proj"], factors["up_proj"], activation)[None]
    sums = dict(zip(factors, projection_scores(x, rows, list(factors.values()))))
    return _attention(group, sums, heads)


def _attention(group: str, sums: Mapping[str, Tensor], heads: HeadGeometry) -> Tensor:
    if group == "vo":
        return sums["v_proj"][None]
    return torch.stack([heads.q_pair_sums(sums["q_proj"]), heads.k_pair_sums(sums["k_proj"])])


def scores_of(sums: Tensor) -> Tensor:
    """Sums (1 or 2, n) -> scores (n,), fp64."""
    return sums.double().prod(0)


def truncated(factors: Factors, rank: int) -> Factors:
    """The factors of a smaller rank: a truncated SVD holds every smaller one."""
    a, b = factors
    return a[:rank], b[:, :rank]


# --- figures of one choice --------------------------------------------------------------------------------------------


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of the channels in ``first`` (k,) that are also in ``second`` (k,)."""
    return float(torch.isin(first, second).double().mean())


def energy_share(kept: Tensor, energy: Tensor) -> float:
    """Σ of ``energy`` (n,) over ``kept`` / Σ of all; 1 where there is none to lose."""
    whole = float(energy.double().sum())
    return float(energy.double()[kept].sum()) / whole if whole > 0 else 1.0


def random_channels(channels: int, keep: int, generator: torch.Generator) -> Tensor:
    """``keep`` of ``channels`` drawn evenly, ascending."""
    return torch.randperm(channels, generator=generator)[:keep].sort().values


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over batches."""

    mean: float
    spread: float
    """Standard deviation; 0 of a single batch."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """``None`` of no values."""
        if not values:
            return None
        mean = sum(values) / len(values)
        deviation = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        return cls(mean, math.sqrt(deviation))


# --- one layer's group over batches -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Site:
    """Figures of one layer's group, batch by batch.

    Args:
        layer, group: which.
        channels, keep: how many there are, and how many a sparse step keeps.
        sparsity: as configured.
        own_rank: the estimator's rank in training; masks are compared over batches and ranks at this one.
        blocks: the channels stand in so many blocks, the experts of a mixture, that keep equally many each.
    """

    layer: int
    group: str
    channels: int
    keep: int
    sparsity: float
    own_rank: int
    blocks: int = 1
    recall: dict[str, list[float]] = field(default_factory=dict)
    """By choice (``random``, a rank, ``exact``): a value per batch."""
    energy: dict[str, list[float]] = field(default_factory=dict)
    adapted_recall: list[float] = field(default_factory=list)
    """At the own rank, against the activations with the LoRA branch."""
    steps: list[float] = field(default_factory=list)
    """Overlap with the batch before."""
    ranks: list[float] = field(default_factory=list)
    """Overlap of two halves of a batch."""
    last: Tensor | None = None
    """Kept channels of the newest batch at the own rank."""

    def add(
        self,
        exact: Tensor,
        estimates: Mapping[int, Tensor],
        generator: torch.Generator,
        adapted: Tensor | None = None,
        filled: Sequence[bool] = (True, True),
    ) -> None:
        """One batch.

        Args:
            exact: (2 halves, 1 or 2, n) sums of the exact activations.
            estimates: the same by rank.
            generator: of the random choice, on the CPU.
            adapted: ``exact`` with the LoRA branch, where there is one.
            filled: which halves have context tokens.
        """
        energy = scores_of(exact.sum(0)).cpu()
        oracle = self._chosen(energy)
        kept = {rank: self._chosen(scores_of(sums.sum(0)).cpu()) for rank, sums in estimates.items()}
        choices = {RANDOM: self._random(generator)}
        choices |= {str(rank): mask for rank, mask in kept.items()} | {EXACT: oracle}
        for name, mask in choices.items():
            self.recall.setdefault(name, []).append(overlap(mask, oracle))
            self.energy.setdefault(name, []).append(energy_share(mask, energy))
        own = kept[self.own_rank]
        if adapted is not None:
            self.adapted_recall.append(overlap(own, self._chosen(scores_of(adapted.sum(0)).cpu())))
        if all(filled):
            first, second = (self._chosen(scores_of(half).cpu()) for half in estimates[self.own_rank])
            self.ranks.append(overlap(first, second))
        if self.last is not None:
            self.steps.append(overlap(own, self.last))
        self.last = own

    def _chosen(self, scores: Tensor) -> Tensor:
        if self.blocks == 1:
            return select_channels(scores, self.keep)
        return select_grouped(scores, self.blocks, self.keep // self.blocks)[0]

    def _random(self, generator: torch.Generator) -> Tensor:
        width, keep = self.channels // self.blocks, self.keep // self.blocks
        return torch.cat([block * width + random_channels(width, keep, generator) for block in range(self.blocks)])

    def to_dict(self) -> dict[str, object]:
        """Means and spreads over batches; ``None`` where nothing could be compared."""
        return {
            "layer": self.layer,
            "group": self.group,
            "channels": self.channels,
            "kept": self.keep,
            "sparsity": self.sparsity,
            "random_expected": self.keep / self.channels,
            "recall": {name: _dict(values) for name, values in self.recall.items()},
            "energy": {name: _dict(values) for name, values in self.energy.items()},
            "adapted_recall": _dict(self.adapted_recall),
            "between_steps": _dict(self.steps),
            "between_ranks": _dict(self.ranks),
        }


def _dict(values: Sequence[float]) -> dict[str, float] | None:
    spread = Spread.of(values)
    return None if spread is None else {"mean": spread.mean, "spread": spread.spread}


def group_means(sites: Sequence[Site]) -> dict[str, dict[str, object]]:
    """Means over the layers of each group, of what :meth:`Site.to_dict` gives per layer."""
    groups: dict[str, dict[str, object]] = {}
    for group in dict.fromkeys(site.group for site in sites):
        mine = [site for site in sites if site.group == group]
        names = list(mine[0].recall)
        groups[group] = {
            "layers": len(mine),
            "random_expected": _mean([site.keep / site.channels for site in mine]),
            "recall": {name: _mean([Spread.of(site.recall[name]) for site in mine]) for name in names},
            "energy": {name: _mean([Spread.of(site.energy[name]) for site in mine]) for name in names},
            "adapted_recall": _mean([Spread.of(site.adapted_recall) for site in mine]),
            "between_steps": _mean([Spread.of(site.steps) for site in mine]),
            "between_ranks": _mean([Spread.of(site.ranks) for site in mine]),
        }
    return groups


def _mean(values: Sequence[Spread | float | None]) -> float | None:
    numbers = [value.mean if isinstance(value, Spread) else value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
