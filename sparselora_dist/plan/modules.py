"""The modules of a sparse LoRA model with their parameters, as the engines meet them: no weights, only shapes.

Names and order follow ``apply.py`` and PEFT: a LoRA layer holds ``base_layer``, ``lora_A`` and ``lora_B``, or reads all
of them itself where base and branch are one operation; a sparse FFN is one leaf for ZeRO-3; a sparse attention's
estimator runs inside its first sparse projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..codecs import Codec, FloatsCodec, PlainCodec
from ..config import ConfigError, RunConfig
from ..method.channels import ATTENTION, FFN, SCORED, TRANSPOSED
from .parts import Module, Parameter, Tree
from .shapes import ModelShape

VALUES = ("rows", "codes")
"""Parts of a stored matrix that have something for every weight."""


Stored = Callable[[str, bool], "Codec | None"]
"""How a checkpoint that is quantised already stores the matrix of a module, ``model.layers.0.mlp.up_proj``, by whether it is
stored transposed; ``None``: it stays as it is."""


def build_tree(
    shape: ModelShape, config: RunConfig, codec: Codec, adapter: torch.dtype, stored: Stored | None = None
) -> Tree:
    """The modules of ``shape`` with the run's adapter and sparse layers.

    Args:
        codec: stores the matrices of every decoder layer; the rest is in ``model.dtype``.
        adapter: dtype of the LoRA parameters: the masters themselves (fp32), or ``model.dtype`` under ZeRO-3.
        stored: says for each matrix what stores it, in the place of ``codec``.

    Raises:
        ConfigError: a LoRA option that adds parameters which are not modelled, or that matches no matrix.
    """
    builder = Builder(shape, config, codec, adapter, stored)
    if shape.data is not None:
        from ..layouts import adapted, decoder_layers, rest_of
        from .any_layer import tree_of_model

        model = adapted(shape.data, config.lora)
        return _finished(tree_of_model(builder, model, decoder_layers(model), rest_of(model)), config)
    embedding = builder.plain("embed_tokens", {"weight": (shape.vocabulary, shape.hidden)})
    head = builder.plain("lm_head", {"weight": (shape.vocabulary, shape.hidden)})
    if shape.tied:
        head.parameters = embedding.parameters
    layers = [builder.layer(index) for index in range(shape.layers)]
    if not any(p.trainable for layer in layers for p in layer.walk()):
        targets = config.lora.values["target_modules"]
        raise ConfigError(f"'lora.target_modules' is {targets!r}: it matches none of {', '.join((*ATTENTION, *FFN))}")
    return _finished(Tree(embedding, layers, builder.plain("norm", {"weight": (shape.hidden,)}), head), config)


def _finished(tree: Tree, config: RunConfig) -> Tree:
    tree.embedding.read_in_backward = False  # It is frozen.
    tree.head.read_in_backward = (
        not config.sparse_lora.skip_unused_logits
    )  # Else the loss in chunks has read it already.
    return tree


class Builder:
    """Makes modules of a run's model."""

    def __init__(
        self, shape: ModelShape, config: RunConfig, codec: Codec, adapter: torch.dtype, stored: Stored | None
    ) -> None:
        self.shape, self.codec, self.adapter, self.stored_as = shape, codec, adapter, stored
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.ranks = _LoraRanks(config, any_name=shape.data is not None)
        sparse = config.sparse_lora
        self.estimator_rank = sparse.rank
        self.sparsity = sparse.sparsity(shape.layers, shape.able) if sparse.enabled else {}

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
        stored = self.stored(at, self.codec_of(at, name), (columns, rows) if name in TRANSPOSED else (rows, columns))
        if self.shape.has_bias(name):
            stored.append(Parameter(f"{at}.bias", (rows,), self.dtype, "weights"))
        return self.with_adapter(at, stored, self.ranks.of(f"model.{at}"), (rows, columns))

    def codec_of(self, at: str, name: str) -> Codec:
        """What stores the matrix ``name`` at a place."""
        if self.stored_as is None:
            return self.codec
        return self.stored_as(f"model.{at}", name in TRANSPOSED) or PlainCodec(self.dtype)

    def codec_of_bank(self, at: str, name: str, width: int) -> Codec:
        """What stores the experts' ``gate_up_proj`` or ``down_proj`` at a place, of ``width`` neurons each."""
        if self.stored_as is None:
            return self.codec
        down = name == "down_proj"
        matrix = f"model.{at}.0.{'down_proj' if down else 'gate_proj'}"
        codec = self.stored_as(matrix, down) if self.stored_as(f"model.{at}", down) else None
        if not isinstance(codec, FloatsCodec):
            return codec or PlainCodec(self.dtype)
        try:
            return codec.stacked(width)
        except ValueError as error:
            raise ValueError(
                f"model.{at} is quantised: {error}. Plan with the checkpoint that it was made from, which a run needs too"
            ) from error

    def stored(self, at: str, codec: Codec, shape: tuple[int, int]) -> list[Parameter]:
        """The parameters of a frozen matrix (channels, row length)."""
        channels, length = shape
        return [
            Parameter(
                f"{at}.{part}",
                (spec.rows(channels), spec.width),
                spec.dtype,
                "weights" if part in VALUES else "scales",
                channels * length if part in VALUES else 0,
            )
            for part, spec in codec.parts(length).items()
        ]

    def with_adapter(
        self, at: str, stored: list[Parameter], rank: int | None, shape: tuple[int, int], joined: bool = True
    ) -> Module:
        """A linear of ``shape`` (out, in), with an adapter of that rank where there is one.

        ``joined``: base and branch are one operation where the adapter allows it.
        """
        rows, columns = shape
        if rank is None:
            return Module(at, stored)
        a = Parameter(f"{at}.lora_A", (rank, columns), self.adapter, "lora")
        b = [Parameter(f"{at}.lora_B", (rows, rank), self.adapter, "lora")]
        if self.ranks.bias:
            b.append(Parameter(f"{at}.lora_B.bias", (rows,), self.adapter, "lora"))
        if self.ranks.fused and joined:
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
        return [p for name in names for p in self.factors(index, name, self.shape.matrix(name))]

    def factors(self, index: int, name: str, shape: tuple[int, int]) -> list[Parameter]:
        """The estimator's of a matrix (out, in)."""
        rows, columns = shape
        rank = min(self.estimator_rank, rows, columns)
        sides = (("a", (rank, columns)), ("b", (rows, rank)))
        return [Parameter(f"layers.{index}.{name}_{side}", size, self.dtype, "factors") for side, size in sides]


def matrix_sizes(tree: Tree, codec: Codec) -> tuple[int, int]:
    """Bytes of the frozen matrices that ``codec`` stores in all decoder layers, and their values."""
    names = tuple(codec.parts(1))
    stored = [p for layer in tree.layers for p in layer.walk() if p.name.endswith(tuple(f".{name}" for name in names))]
    return sum(p.numel * p.dtype.itemsize for p in stored), sum(p.values for p in stored)


def base_layer(module: Module) -> Module:
    """The frozen matrix of a LoRA layer, or the module itself."""
    return module.children[0] if module.external else module


class _LoraRanks:
    """Which matrices carry an adapter, by PEFT's own matching of names."""

    def __init__(self, config: RunConfig, any_name: bool = False) -> None:
        values = config.lora.values
        uncounted = ["modules_to_save", "trainable_token_indices"]
        if not any_name:
            uncounted.append("target_parameters")  # Of a family that has no experts.
        for key in uncounted:
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
            if not any_name and not self.all and self._matches(name):
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
