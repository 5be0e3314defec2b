"""The modules of a sparse LoRA model with their parameters, as the engines meet them: no weights, only shapes.

Names and order follow ``apply.py`` and PEFT: a LoRA layer holds ``base_layer``, ``lora_A`` and ``lora_B``, or reads all
of them itself where base and branch are one operation; a sparse FFN is one leaf for ZeRO-3; a sparse attention's
estimator runs inside its first sparse projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..codecs import Codec
from ..config import ConfigError, RunConfig
from ..method.channels import ATTENTION, FFN, SCORED, TRANSPOSED
from .shapes import ModelShape

Kind = Literal["weights", "scales", "factors", "lora"]


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A parameter's shape; compared by identity, so that a tied one is itself in both places."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind

    @property
    def trainable(self) -> bool:
        return self.kind == "lora"

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(slots=True, eq=False)
class Module:
    """A module as the engines' hooks see it."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    """Its own."""
    children: list[Module] = field(default_factory=list)
    """In the order in which they run."""
    external: list[Parameter] = field(default_factory=list)
    """A child's parameters that its own forward reads: ZeRO-3 gathers them before the child runs."""
    leaf: bool = False
    """ZeRO-3 gathers everything below at once and sets no hooks there."""
    gives_grad: bool = False
    """Its output needs a gradient even if its input does not (LoRA)."""
    by_name: bool = False
    """Called with keyword arguments only, so that ZeRO-3's hook behind its backward never fires."""
    first_forward_only: bool = False
    """Does not run in recomputation, nor in backward (the estimator)."""
    read_in_backward: bool = True
    """Its backward reads its weights. FSDP2 gathers a unit that says no for the forward only."""

    def walk(self) -> Iterator[Parameter]:
        yield from self.parameters
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Tree:
    """A model."""

    embedding: Module
    layers: list[Module]
    norm: Module
    head: Module

    @property
    def ends(self) -> list[Module]:
        """FSDP2's units beside the layers: embedding and head; one where they are tied, for as long as the head's."""
        return [self.head] if self.embedding.parameters == self.head.parameters else [self.embedding, self.head]

    def root_parameters(self) -> list[Parameter]:
        """What is in no decoder layer, a tied head once."""
        found = [*self.embedding.parameters, *self.norm.parameters, *self.head.parameters]
        return list(dict.fromkeys(found))

    def parameters(self) -> list[Parameter]:
        return [*self.root_parameters(), *(p for layer in self.layers for p in layer.walk())]


def build_tree(shape: ModelShape, config: RunConfig, codec: Codec, adapter: torch.dtype) -> Tree:
    """The modules of ``shape`` with the run's adapter and sparse layers.

    Args:
        codec: stores the matrices of every decoder layer; the rest is in ``model.dtype``.
        adapter: dtype of the LoRA parameters: the masters themselves (fp32), or ``model.dtype`` under ZeRO-3.

    Raises:
        ConfigError: a LoRA option that adds parameters which are not modelled, or that matches no matrix.
    """
    builder = _Builder(shape, config, codec, adapter)
    embedding = builder.plain("embed_tokens", {"weight": (shape.vocabulary, shape.hidden)})
    head = builder.plain("lm_head", {"weight": (shape.vocabulary, shape.hidden)})
    if shape.tied:
        head.parameters = embedding.parameters
    embedding.read_in_backward = False  # It is frozen.
    head.read_in_backward = not config.sparse_lora.skip_unused_logits  # Else the loss in chunks has read it already.
    layers = [builder.layer(index) for index in range(shape.layers)]
    if not any(p.trainable for layer in layers for p in layer.walk()):
        targets = config.lora.values["target_modules"]
        raise ConfigError(f"'lora.target_modules' is {targets!r}: it matches none of {', '.join((*ATTENTION, *FFN))}")
    return Tree(embedding, layers, builder.plain("norm", {"weight": (shape.hidden,)}), head)


class _Builder:
    def __init__(self, shape: ModelShape, config: RunConfig, codec: Codec, adapter: torch.dtype) -> None:
        self.shape, self.codec, self.adapter = shape, codec, adapter
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.ranks = _LoraRanks(config)
        sparse = config.sparse_lora
        self.estimator_rank = sparse.rank
        self.sparsity = sparse.sparsity(shape.layers) if sparse.enabled else {}

    def plain(self, name: str, shapes: dict[str, tuple[int, ...]]) -> Module:
        return Module(name, [Parameter(f"{name}.{key}", size, self.dtype, "weights") for key, size in shapes.items()])

    def layer(self, index: int) -> Module:
        shape, at = self.shape, f"layers.{index}"
        groups = [group for group, layers in self.sparsity.items() if index in layers]
        linears = {name: self._linear(index, name) for name in (*ATTENTION, *FFN)}
        scored = [name for group in groups if group != "ffn" for name in SCORED[group]]
        if scored:
            estimator = Module(f"{at}.self_attn.sparse_estimator", self._factors(index, scored))
            estimator.first_forward_only = True
            base_layer(linears["q_proj" if "qk" in groups else "v_proj"]).children.append(estimator)
        heads: list[Module] = []
        for name in ("q_proj", "k_proj", "v_proj"):
            heads.append(linears[name])
            if shape.qk_norm and name != "v_proj":
                heads.append(self.plain(f"{at}.self_attn.{name[0]}_norm", {"weight": (shape.heads.head_dim,)}))
        attention = Module(f"{at}.self_attn", children=[*heads, linears["o_proj"]], by_name=True)
        activation = Module(f"{at}.mlp.act_fn")
        mlp = Module(f"{at}.mlp", children=[linears["gate_proj"], activation, linears["up_proj"], linears["down_proj"]])
        if "ffn" in groups:
            mlp.leaf = True
            mlp.gives_grad = any(p.trainable for p in mlp.walk())
            mlp.children.append(Module(f"{at}.mlp.estimator", self._factors(index, list(SCORED["ffn"]))))
        norm: dict[str, tuple[int, ...]] = {"weight": (shape.hidden,)}
        first, second = self.plain(f"{at}.input_layernorm", norm), self.plain(f"{at}.post_attention_layernorm", norm)
        return Module(at, children=[first, attention, second, mlp])

    def _linear(self, index: int, name: str) -> Module:
        rows, columns = self.shape.matrix(name)
        at = f"layers.{index}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
        channels, length = (columns, rows) if name in TRANSPOSED else (rows, columns)
        stored = [
            Parameter(f"{at}.{part}", (channels, spec.width), spec.dtype, "scales" if part == "scales" else "weights")
            for part, spec in self.codec.parts(length).items()
        ]
        if self.shape.has_bias(name):
            stored.append(Parameter(f"{at}.bias", (rows,), self.dtype, "weights"))
        rank = self.ranks.of(f"model.{at}")
        if rank is None:
            return Module(at, stored)
        a = Parameter(f"{at}.lora_A", (rank, columns), self.adapter, "lora")
        b = [Parameter(f"{at}.lora_B", (rows, rank), self.adapter, "lora")]
        if self.ranks.bias:
            b.append(Parameter(f"{at}.lora_B.bias", (rows,), self.adapter, "lora"))
        if self.ranks.fused:
            # One operation reads them all from the LoRA layer's forward, and ZeRO-3 takes them for the layer's own.
            return Module(at, [a, *b, *stored], gives_grad=True)
        # PEFT asks lora_A for its dtype, so that ZeRO-3 takes its weight for one of the LoRA layer's own.
        return Module(
            at,
            children=[
                Module(f"{at}.base_layer", stored),
                Module(f"{at}.lora_dropout"),
                Module(f"{at}.lora_A", [a], gives_grad=True),
                Module(f"{at}.lora_B", b, gives_grad=True),
            ],
            external=[a],
            gives_grad=True,
        )

    def _factors(self, index: int, names: list[str]) -> list[Parameter]:
        found = []
        for name in names:
            rows, columns = self.shape.matrix(name)
            for side, size in (("a", (self.estimator_rank, columns)), ("b", (rows, self.estimator_rank))):
                found.append(Parameter(f"layers.{index}.{name}_{side}", size, self.dtype, "factors"))
        return found


def base_layer(module: Module) -> Module:
    """The frozen matrix of a LoRA layer, or the module itself."""
    return module.children[0] if module.external else module


class _LoraRanks:
    """Which matrices carry an adapter, by PEFT's own matching of names."""

    def __init__(self, config: RunConfig) -> None:
        values = config.lora.values
        for key in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            if values.get(key):
                raise ConfigError(
                    f"'lora.{key}' is {values[key]!r}: it trains base parameters, which a plan does not count"
                )
        self.bias = bool(values.get("lora_bias"))
        self.fused = not self.bias and not values.get("lora_dropout")
        """Base and branch are computed together (:class:`sparselora_dist.layers.lora.FusedLoRA`)."""
        self.all = values["target_modules"] == "all-linear"
        self.config: Any = config.lora.build()
        for name in ("model.embed_tokens", "lm_head"):
            if not self.all and self._matches(name):
                raise ConfigError(
                    f"'lora.target_modules' is {values['target_modules']!r}: adapters on {name} are not planned; allowed: "
                    f"{', '.join((*ATTENTION, *FFN))}"
                )

    def _matches(self, key: str) -> bool:
        from peft.tuners.tuners_utils import check_target_module_exists

        return bool(check_target_module_exists(self.config, key))

    def of(self, key: str) -> int | None:
        """Rank of the adapter on the matrix ``key``, or None."""
        if not (self.all or self._matches(key)):
            return None
        if not self.config.rank_pattern:
            return self.config.r
        from peft.utils.other import get_pattern_key

        return self.config.rank_pattern.get(get_pattern_key(self.config.rank_pattern.keys(), key), self.config.r)
