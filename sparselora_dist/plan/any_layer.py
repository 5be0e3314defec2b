"""The decoder layers of a family that is not modelled by hand: module by module what its model on the meta device has.

Order is that of registration, with norms where their names say they run; that and unknown modules make ZeRO-3's traffic an
estimate. Bytes are exact.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..codecs import PlainCodec
from ..layouts import DecoderLayer, base_linear, innermost
from ..method.channels import SCORED, TRANSPOSED
from .parts import Module, Parameter, Tree

_ORDER = (
    "input",
    "pre_mixer",
    "ln_1",
    "attn",
    "attention",
    "mixer",
    "post_attention",
    "pre_feedforward",
    "ln_2",
    "pre_ff",
)


def tree_of_model(builder: Any, model: Any, layers: list[DecoderLayer], rest: list[tuple[str, Any]]) -> Tree:
    """Of a PEFT model on the meta device.

    Args:
        builder: a :class:`~.modules.Builder`.
        rest: what is in no layer, embedding or head.
    """
    lm = model.get_base_model()
    embedding = builder.plain("embed_tokens", _own(lm.get_input_embeddings()))
    head = builder.plain("lm_head", _own(lm.get_output_embeddings()))
    if lm.get_output_embeddings().weight is lm.get_input_embeddings().weight:
        head.parameters = embedding.parameters
    norm = builder.plain("norm", {name: tuple(p.shape) for name, p in rest})
    return Tree(embedding, [_Layer(builder, layer).module() for layer in layers], norm, head)


def _own(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}


class _Layer:
    def __init__(self, builder: Any, layer: DecoderLayer) -> None:
        self.builder, self.layer = builder, layer
        self.groups = [group for group, layers in builder.sparsity.items() if layer.index in layers]
        self.known = {id(layer.matrix(name)): name for name in layer.names}

    def module(self) -> Module:
        """The layer."""
        return self._any(self.layer.module, f"layers.{self.layer.index}")

    def _any(self, module: Any, at: str) -> Module:
        layer = self.layer
        if layer.experts and module is layer.experts.outer:
            return self._experts(at)
        if isinstance(base_linear(module), nn.Linear):
            return self._linear(module, at)
        children = [self._any(child, f"{at}.{name}") for name, child in module.named_children()]
        own = [Parameter(f"{at}.{n}", tuple(p.shape), self.builder.dtype, "weights") for n, p in _parameters(module)]
        made = Module(at, own, sorted(children, key=_rank))
        if layer.attention and module is layer.attention.module:
            made.by_name = True
            scored = [name for group in self.groups if group in ("qk", "vo") for name in layer.scored(group)]
            if scored:
                estimator = Module(f"{at}.sparse_estimator", self._factors(scored), first_forward_only=True)
                made.children.insert(0, estimator)
        if layer.ffn and "ffn" in self.groups and module is layer.ffn.module:
            estimator = Module(f"{at}.estimator", self._factors(list(layer.scored("ffn"))))
            if layer.ffn.kind == "gated":
                made.leaf = True
                made.gives_grad = any(p.trainable for p in made.walk())
            made.children.append(estimator)
        return made

    def _linear(self, module: Any, at: str) -> Module:
        linear = base_linear(module)
        rows, columns = linear.out_features, linear.in_features
        name = self.known.get(id(linear))
        codec = self.builder.codec_of(at, name) if name else PlainCodec(self.builder.dtype)
        stored = self.builder.stored(at, codec, (columns, rows) if name in TRANSPOSED else (rows, columns))
        if linear.bias is not None:
            stored.append(Parameter(f"{at}.bias", (rows,), self.builder.dtype, "weights"))
        if name:  # What it is called here: FLOPs ask for it.
            at = f"{at.rpartition('.')[0]}.{name}"
        rank = next((a.weight.shape[0] for a in module.lora_A.values()), None) if module is not linear else None
        return self.builder.with_adapter(at, stored, rank, (rows, columns), joined=name is not None)

    def _experts(self, at: str) -> Module:
        """One leaf: its matrices, factors and adapters are read together."""
        experts, builder = self.layer.experts, self.builder
        assert experts is not None
        hidden, count, width = experts.hidden, experts.count, experts.width
        found = [
            p
            for name, channels in (("gate_up_proj", 2 * count * width), ("down_proj", count * width))
            for p in builder.stored(f"{at}.{name}", builder.codec_of_bank(at, name, width), (channels, hidden))
        ]
        for name, p in _parameters(innermost(experts.outer)):
            if name not in ("gate_up_proj", "down_proj"):
                found.append(Parameter(f"{at}.{name}", tuple(p.shape), builder.dtype, "weights"))
        if "experts" in self.groups:
            rank = min(builder.estimator_rank, width, hidden)
            for name in SCORED["experts"]:
                for side, shape in (("a", (count * rank, hidden)), ("b", (count * width, rank))):
                    found.append(Parameter(f"{at}.{name}_{side}", shape, builder.dtype, "factors"))
        for number, wrapper in enumerate(experts.wrappers):
            for side, linears in (("lora_A", wrapper.lora_A), ("lora_B", wrapper.lora_B)):
                for linear in linears.values():
                    shape = tuple(linear.weight.shape)
                    found.append(Parameter(f"{at}.{number}.{side}", shape, builder.adapter, "lora"))
        return Module(at, found, leaf=True, gives_grad=bool(experts.wrappers))

    def _factors(self, names: list[str]) -> list[Parameter]:
        found = []
        for name in names:
            stored, rows = self.layer.within(name)
            linear = self.layer.matrix(stored)
            every = range(linear.out_features)
            count = len(every[rows] if isinstance(rows, slice) else every if rows is None else rows)
            found += self.builder.factors(self.layer.index, name, (count, linear.in_features))
        return found


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    return list(module.named_parameters(recurse=False))


def _rank(module: Module) -> tuple[int, int]:
    """When it runs in its parent, by its name; what no word is known of, in between."""
    name = module.name.rpartition(".")[2]
    if name in ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj"):
        return 0, ("q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj").index(name)
    found = [number for number, word in enumerate(_ORDER) if word in name]
    return 1, max(found) if found else len(_ORDER)
