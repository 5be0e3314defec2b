"""Watches a dense evaluation forward, and scores what passes: exactly, and as the estimator would have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_kernels import kept_count, kept_per_expert

from ..io.factors import FactorSet
from ..layers.lora import active_branches
from ..layers.masked import masked_by
from ..layouts import DecoderLayer, decoder_layers
from ..method.tokens import partition_tokens
from .expert_sums import ExpertSums
from .fidelity import Site, estimated_sums, exact_sums, truncated

_HALVES = 2


@dataclass(slots=True)
class _Seen:
    """What one layer's linears were given and gave, until its module is done."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    adapted: dict[str, Tensor] = field(default_factory=dict)


class Observer:
    """Hooks on the linears that scores need. Use it around forwards; :attr:`sites` has the figures.

    Args:
        model: a causal LM or a PEFT model of a supported family, dense, in evaluation mode.
        sparsity: group -> layer -> sparsity.
        factors: of every scored matrix, of the largest rank.
        ranks: of the estimators to compare, ``own_rank`` among them.
        own_rank: the rank in training.
        seed: of the random choice.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Mapping[str, Mapping[int, float]],
        factors: FactorSet,
        *,
        ranks: Sequence[int],
        own_rank: int,
        seed: int = 0,
    ) -> None:
        if own_rank not in ranks:
            raise ValueError(f"the training rank {own_rank} is not among the ranks {list(ranks)}")
        self.ranks = tuple(ranks)
        self.factors = factors
        self.layers = [
            layer for layer in decoder_layers(model) if any(layer.index in by_layer for by_layer in sparsity.values())
        ]
        layers = {layer.index: layer for layer in self.layers}
        self.sites = {
            (index, group): self._site(layers[index], group, value, own_rank)
            for group, by_layer in sparsity.items()
            for index, value in sorted(by_layer.items())
        }
        self._heads = {layer.index: layer.attention.heads if layer.attention else None for layer in self.layers}
        self._random = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._seen: dict[int, _Seen] = {}

    @staticmethod
    def _site(layer: DecoderLayer, group: str, sparsity: float, own_rank: int) -> Site:
        count = layer.channels[group]
        if group != "experts" or layer.experts is None:
            return Site(layer.index, group, count, kept_count(count, sparsity), sparsity, own_rank)
        blocks = layer.experts.count
        keep = blocks * kept_per_expert(layer.experts.width, sparsity)
        return Site(layer.index, group, count, keep, sparsity, own_rank, blocks)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are there inside, and gone after."""
        handles: list[Any] = []
        try:
            for layer in self.layers:
                handles += self._watch(layer)
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def begin(self, halves: Sequence[Tensor]) -> None:
        """Name the context tokens of the next forward: flat positions of the batch's first and second half."""
        self._rows = list(halves)

    def _watch(self, layer: DecoderLayer) -> Iterator[Any]:
        groups = [group for index, group in self.sites if index == layer.index]
        if "experts" in groups and layer.experts:
            yield layer.experts.module.register_forward_pre_hook(self._experts(layer), with_kwargs=True)
            groups.remove("experts")
        for group in groups:
            for name in layer.scored(group):
                stored, _ = layer.within(name)
                outer, frozen = layer.linear(stored), layer.matrix(stored)
                yield frozen.register_forward_hook(self._keep(layer, name, "frozen"))
                if outer is not frozen and next(active_branches(outer), None) is not None:
                    if masked_by(outer):  # It computes with a matrix of its own.
                        yield outer.register_forward_hook(_also(frozen))
                    yield outer.register_forward_hook(self._keep(layer, name, "adapted"))
        if "ffn" in groups and layer.ffn:
            yield layer.ffn.module.register_forward_hook(self._finish(layer, ("ffn",)))
        attention = tuple(group for group in groups if group != "ffn")
        if attention and layer.attention:
            yield layer.attention.module.register_forward_hook(self._finish(layer, attention))

    def _keep(self, layer: DecoderLayer, name: str, kind: str) -> Callable[..., None]:
        stored, rows = layer.within(name)
        # The estimate knows no bias but that of an FFN without a gate; exact scores of the same thing.
        bias = layer.matrix(stored).bias if self._bias(layer, name) is None else None

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen = self._seen.setdefault(layer.index, _Seen())
            flat = output.detach().reshape(-1, output.shape[-1])
            flat = flat if bias is None else flat - bias.to(flat.dtype)
            getattr(seen, kind)[name] = flat if rows is None else flat[:, rows]
            if kind == "frozen":
                seen.inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    def _experts(self, layer: DecoderLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert layer.experts is not None
            x, chosen, weights = (*args, *kwargs.values())
            sums = ExpertSums(layer.experts, x, chosen, weights, self._rows)
            factors = {name: self.factors[layer.index, name] for name in layer.scored("experts")}
            estimates = {rank: sums.estimated(factors, rank) for rank in self.ranks}
            filled = [rows.numel() > 0 for rows in self._rows]
            self.sites[layer.index, "experts"].add(sums.exact(), estimates, self._random, filled=filled)

        return hook

    @staticmethod
    def _bias(layer: DecoderLayer, name: str) -> Tensor | None:
        """What the estimate adds to the matrix' product."""
        plain = name == "up_proj" and layer.ffn is not None and layer.ffn.kind == "plain"
        return layer.matrix(name).bias if plain else None

    def _finish(self, layer: DecoderLayer, groups: tuple[str, ...]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen = self._seen[layer.index]
            for group in groups:
                names = layer.scored(group)
                outputs = {name: seen.frozen.pop(name) for name in names}
                adapted = {name: seen.adapted.pop(name, outputs[name]) for name in names}
                self._add(layer, group, seen.inputs[names[0]], outputs, adapted)
                for name in names:
                    del seen.inputs[name]

        return hook

    def _add(
        self, layer: DecoderLayer, group: str, x: Tensor, outputs: dict[str, Tensor], adapted: dict[str, Tensor]
    ) -> None:
        heads: Any = self._heads[layer.index]
        activation: Any = layer.ffn.activation if layer.ffn else None
        bias = self._bias(layer, "up_proj") if group == "ffn" else None

        def exact(tensors: dict[str, Tensor]) -> Tensor:
            return torch.stack([exact_sums(group, tensors, rows, heads, activation) for rows in self._rows])

        estimates = {}
        for rank in self.ranks:
            own = {
                name: tuple(part.to(x.device) for part in truncated(self.factors[layer.index, name], rank))
                for name in outputs
            }
            estimates[rank] = torch.stack(
                [estimated_sums(group, x, rows, own, heads, activation, bias) for rows in self._rows]
            )
        differs = any(adapted[name] is not outputs[name] for name in outputs)
        self.sites[layer.index, group].add(
            exact(outputs),
            estimates,
            self._random,
            exact(adapted) if differs else None,
            [rows.numel() > 0 for rows in self._rows],
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """What :func:`observe` saw."""

    sites: list[Site]
    batches: int
    tokens: int
    """Real ones."""
    context_tokens: int


@torch.no_grad()
def observe(
    model: Any,
    observer: Observer,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Observed:
    """Run ``batches`` (``input_ids``, ``attention_mask``, ``labels``) densely; those without context tokens say nothing.

    The first and the second half of a batch's rows stand for two ranks.
    """
    model.eval()
    count = tokens = context = 0
    with observer.watching():
        for batch in batches:
            found = partition_tokens(batch["labels"], batch["attention_mask"]).context
            rows, length = batch["labels"].shape
            tokens += int(batch["attention_mask"].sum())
            if not found.numel():
                continue
            count, context = count + 1, context + found.numel()
            middle = (rows + 1) // _HALVES * length
            halves = [found[found < middle].to(device), found[found >= middle].to(device)]
            observer.begin(halves)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with autocast():
                model(**inputs, use_cache=False)
    return Observed(list(observer.sites.values()), count, tokens, context)


def _also(frozen: nn.Module) -> Callable[..., None]:
    """A hook that calls the frozen matrix too."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        frozen(args[0])

    return hook
