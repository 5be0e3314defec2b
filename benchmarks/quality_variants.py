"""What quality.py compares: the variants, those of them that are no option of the library, and how sparsity is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_dist.apply import find_state
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.data import TokenDataset, collate
from sparselora_dist.layers.context import SparseContext
from sparselora_dist.layers.estimator import AttentionEstimator, FFNEstimator
from sparselora_dist.layers.ffn import SparseFFN
from sparselora_dist.layers.linear import AttentionChannels, SparseProjection
from sparselora_dist.layouts import base_linear
from sparselora_dist.method.flops import FlopModel, layer_shares
from sparselora_dist.method.tokens import TokenPartition, partition_tokens
from sparselora_kernels import kept_count

GROUPS = ("ffn", "qk", "vo")
"""Of the models that are compared."""
Layers = dict[str, dict[int, float]]
"""Group -> layer -> sparsity."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to fine-tune, described by how it differs from calibrated SparseLoRA with ``global`` masks."""

    what: str
    dense: bool = False
    uniform: tuple[str, ...] = ()
    """Groups that get one sparsity in all layers, of the same FLOPs, in place of the calibrated ones."""
    local: bool = False
    channels: str = "estimator"
    """Who scores: "estimator", "oracle" (exact activations of the frozen matrices) or "random"."""
    split: bool = True
    """False: the tokens of the answer are computed sparsely too."""
    same_flops: bool = True
    """False: without the token split the sparsity stays, and fewer FLOPs are executed."""
    start: float = 0.05
    """Share of the run that is dense."""
    budget: float | None = None
    """Share of the dense run's executed FLOPs; ``None`` is as many steps as the dense run."""


VARIANTS = {
    "base": Variant(what="no training", dense=True, budget=0.0),
    "dense": Variant(what="plain LoRA", dense=True),
    "global": Variant(what="SparseLoRA, calibrated, `global` masks"),
    "local": Variant(what="... `local` masks", local=True),
    "uniform": Variant(what="... one sparsity for all layers and groups", uniform=GROUPS),
    "uniform_ffn": Variant(what="... one sparsity for the FFN of all layers", uniform=("ffn",)),
    "oracle": Variant(what="... exact activations instead of the estimator", channels="oracle"),
    "random": Variant(what="... random channels", channels="random"),
    "no_split": Variant(what="... all tokens sparse, same sparsity", split=False, same_flops=False),
    "no_split_flops": Variant(what="... all tokens sparse, same FLOPs", split=False),
    "no_start": Variant(what="... no dense start", start=0.0),
    "dense_25": Variant(what="plain LoRA", dense=True, budget=0.25),
    "dense_50": Variant(what="plain LoRA", dense=True, budget=0.5),
    "global_25": Variant(what="SparseLoRA", budget=0.25),
    "global_50": Variant(what="SparseLoRA", budget=0.5),
    "global_100": Variant(what="SparseLoRA", budget=1.0),
}


# --- what is not an option of the library: substitutions on one model ------------------------------------------------


def use_oracle(model: nn.Module) -> None:
    """Score by the exact activations of the frozen matrices in place of the low-rank estimate."""
    for module in model.modules():
        if isinstance(module, SparseFFN):
            module.estimator.forward = ExactFFN(module)
        elif isinstance(getattr(module, "sparse_estimator", None), AttentionEstimator):
            module.sparse_estimator.forward = ExactAttention(module)


class ExactFFN:
    def __init__(self, ffn: SparseFFN) -> None:
        self.ffn = ffn

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor]:
        gate, up = (base_linear(m)(x[rows]) for m in (self.ffn.gate_proj, self.ffn.up_proj))
        return ((self.ffn.act_fn(gate) * up).float().square().sum(0),)


class ExactAttention:
    """Same sums, in the same order, as :class:`AttentionEstimator`."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.estimator = attention, attention.sparse_estimator

    def _sums(self, x: Tensor, name: str) -> Tensor:
        # A sparse projection computes kept channels only; what it is made of computes all.
        return FrozenLinear.forward(base_linear(getattr(self.attention, name)), x).float().square().sum(0)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        x, geometry, sums = x[rows], self.estimator.geometry, []
        if self.estimator.qk:
            sums = [geometry.q_pair_sums(self._sums(x, "q_proj")), geometry.k_pair_sums(self._sums(x, "k_proj"))]
        if self.estimator.vo:
            sums.append(self._sums(x, "v_proj"))
        return tuple(sums)


def use_random(model: nn.Module) -> None:
    """Keep channels at random, anew at every step (the run's seed decides which)."""
    for module in model.modules():
        if isinstance(module, (FFNEstimator, AttentionEstimator)):
            module.forward = _Random(module.forward)


class _Random:
    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.rand_like(sums) for sums in self.forward(x, rows))


def use_no_split(context: SparseContext) -> None:
    """Compute every real token sparsely."""
    begin = context.begin

    def begin_all_sparse(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        batch = context._current
        if batch is not None and batch.partition is not None:
            old = batch.partition
            batch.partition = everything_sparse(old)
            context.counts.dense -= old.dense.numel()
            context.counts.context += old.dense.numel()

    context.begin = begin_all_sparse  # type: ignore[method-assign]


def everything_sparse(old: TokenPartition) -> TokenPartition:
    context = torch.cat([old.dense, old.context]).sort().values
    return dataclasses.replace(old, dense=old.dense[:0], context=context)


# --- sparsity and FLOPs ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True, slots=True)
class Budget:
    """FLOPs of a mean training step under any sparsity."""

    model: FlopModel
    tokens: float
    context: float
    labels: float
    length: float

    @classmethod
    def of(cls, model: FlopModel, data: TokenDataset) -> Budget:
        context = 0
        for row in range(len(data)):
            batch = collate(data, [row], 0)
            context += partition_tokens(batch["labels"], batch["attention_mask"]).context.numel()
        tokens, lengths = float(data.lengths.sum()), data.lengths.astype(float)
        labels = float(data.label_counts.sum())
        return cls(model=model, tokens=tokens, context=context, labels=labels, length=(lengths**2).sum() / tokens)

    def share(self, layers: Layers, start: float = 0.0, split: bool = True) -> float:
        """Executed FLOPs over plain LoRA's, of a run that is dense for its first ``start``."""
        counts = self.model.heads.channel_counts(self.model.width)
        model = dataclasses.replace(self.model, layers=layer_shares(len(self.model.layers), counts, layers))
        context = self.context if split else self.tokens
        sparse = model.executed(self.tokens - context, context, self.length, self.labels)
        dense = model.executed(self.tokens, 0, self.length, self.labels)
        return (start * dense + (1 - start) * sparse) / model.dense(self.tokens, self.length)


_MOST = 0.999


def scaled(layers: Layers, target: float, budget: Budget, start: float, *, split: bool) -> Layers:
    """``layers`` with every sparsity times one factor, so that ``target`` of the FLOPs are executed.

    A sparsity is held at 0.999; where even that executes more, it is left at that. ``layers`` holds no zeros.
    """
    low, high = 0.0, _MOST / min(s for by_layer in layers.values() for s in by_layer.values())
    for _ in range(30):
        middle = (low + high) / 2
        if budget.share(_times(layers, middle), start, split) > target:
            low = middle
        else:
            high = middle
    return _times(layers, high)


def _times(layers: Layers, factor: float) -> Layers:
    return {group: {k: min(_MOST, s * factor) for k, s in by_layer.items()} for group, by_layer in layers.items()}


LEVELS = {"ffn": (0.5, 0.75, 0.9, 0.97), "qk": (0.25, 0.5, 0.75), "vo": (0.25, 0.5, 0.75)}


def calibrate(
    model: nn.Module, batches: list[dict[str, Tensor]], budget: Budget, target: float, start: float
) -> Layers:
    """Choose every layer's and group's sparsity for ``target`` of plain LoRA's FLOPs.

    One site alone is made sparse at each of its levels, and the KL divergence of the answer's predictions from those of
    the dense model is its cost. Then, always, the step that costs least per FLOP saved is taken.

    Args:
        model: sparse in all layers and groups, at any sparsity.
    """
    sites = _sites(model)
    whole = {site: (owner[key], owner) for site, (owner, key) in sites.items()}
    costs: dict[tuple[int, str], dict[float, float]] = {site: {0.0: 0.0} for site in sites}
    reference = [_predictions(model, batch, dense=True) for batch in batches]
    for site, (owner, key) in sites.items():
        for level in LEVELS[site[1]]:
            owner[key] = kept_count(whole[site][0], level)
            costs[site][level] = sum(
                nn.functional.kl_div(_predictions(model, batch), dense, log_target=True, reduction="batchmean").item()
                for batch, dense in zip(batches, reference)
            )
        owner[key] = whole[site][0]
    chosen = dict.fromkeys(sites, 0.0)
    while (now := budget.share(_as_layers(chosen), start)) > target:
        moves = []
        for site in sites:
            for level in (level for level in costs[site] if level > chosen[site]):
                saved = now - budget.share(_as_layers({**chosen, site: level}), start)
                moves.append(((costs[site][level] - costs[site][chosen[site]]) / max(saved, 1e-9), site, level))
        if not moves:
            raise SystemExit(f"{now:.1%} of the FLOPs is the least these levels reach on this data: raise --flops")
        _, site, level = min(moves)
        chosen[site] = level
    return _as_layers(chosen)


def _sites(model: nn.Module) -> dict[tuple[int, str], tuple[dict[str, int], str]]:
    """(layer, group) -> where its number of kept channels stands; all are set to all channels."""
    sites: dict[tuple[int, str], tuple[dict[str, int], str]] = {}
    for module in model.modules():
        if isinstance(module, SparseFFN):
            module.keep = base_linear(module.down_proj).in_features
            sites[module.site.layer, "ffn"] = module.__dict__, "keep"
        elif isinstance(module, SparseProjection):
            channels: AttentionChannels = module.channels
            heads = channels.estimator.geometry
            channels.keep.update(qk=heads.qk_channels, vo=heads.vo_channels)
            sites.update({(channels.site.layer, group): (channels.keep, group) for group in channels.keep})
    return sites


def _predictions(model: nn.Module, batch: dict[str, Tensor], dense: bool = False) -> Tensor:
    """Log-probabilities (labels, vocabulary) in training; forwards without gradients would be dense."""
    state = find_state(model)
    assert state is not None
    state.context.enabled = not dense
    return model(**batch).logits.detach().float().flatten(0, -2).log_softmax(-1)


def _as_layers(chosen: dict[tuple[int, str], float]) -> Layers:
    groups = {group: {k: s for (k, g), s in sorted(chosen.items()) if g == group and s > 0} for group in GROUPS}
    return {group: by_layer for group, by_layer in groups.items() if by_layer}
