"""The decoder layers of a model, each by what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config.sparse import GROUPS
from ..method.channels import SCORED, HeadGeometry
from .attention import Attention
from .experts import Experts, find_experts
from .ffn import FFN
from .names import Rows, UnsupportedModelError, base_linear, causal_lm
from .registry import find_attention, find_ffn
from .tried import first_child


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer of a model."""

    index: int
    path: str
    """Name of the layer in the causal LM, ``model.layers.3``."""
    module: nn.Module
    ffn: FFN | None
    attention: Attention | None
    experts: Experts | None
    missing: Mapping[str, str]
    """Group (``ffn``, ``qk``, ``vo``, ``experts``) -> why this layer cannot have it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The frozen matrices that are stored: ``q_proj`` ... ``down_proj``, or ``gate_up_proj`` and ``qkv_proj``."""
        return (*(self.attention.names if self.attention else ()), *(self.ffn.names if self.ffn else ()))

    def _holder(self, name: str) -> Attention | FFN:
        part = next(
            (part for part in (self.attention, self.ffn) if part and (name in part.names or name in part.parts)), None
        )
        assert part is not None, f"layers.{self.index} has no {name}"
        return part

    def slot(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds the linear called ``name``, and what it is called there."""
        part = self._holder(name)
        return part.module, part.names[name]

    def path_of(self, name: str) -> str:
        """The linear's name in the causal LM, ``model.layers.3.mlp.gate_proj``: what files call it."""
        part = self._holder(name)
        return ".".join(filter(None, (self.path, part.path, part.names[name])))

    def within(self, name: str) -> tuple[str, Rows | None]:
        """The stored matrix that the matrix ``name`` is in, and its rows there; ``None``: it is stored by itself."""
        return self._holder(name).parts.get(name, (name, None))

    def scored(self, group: str) -> tuple[str, ...]:
        """The matrices of whose factors the scores of ``group`` are made."""
        return tuple(name for name in SCORED[group] if group != "ffn" or (self.ffn and name in self.ffn.parts))

    def linear(self, name: str) -> Any:
        """The linear called ``name``, in its LoRA layer where it carries an adapter."""
        parent, own = self.slot(name)
        return getattr(parent, own)

    def matrix(self, name: str) -> Any:
        """The frozen linear called ``name`` (``q_proj`` ... ``down_proj``)."""
        return base_linear(self.linear(name))

    @property
    def channels(self) -> dict[str, int]:
        """How many there are, by group."""
        counts: dict[str, int] = {}
        if self.ffn:
            counts["ffn"] = self.matrix("down_proj").in_features
        if self.attention:
            counts |= {"qk": self.attention.heads.qk_channels, "vo": self.attention.heads.vo_channels}
        if self.experts:
            counts["experts"] = self.experts.count * self.experts.width
        return counts

    @property
    def trims(self) -> tuple[nn.Module, ...]:
        """What may be computed at some positions alone if nothing else reads the others: q, o and the FFN.

        Not beside experts: a router's loss reads every position.
        """
        if self.attention is None or self.ffn is None or self.experts or self.ffn.parent is not self.module:
            return ()
        if not self.ffn.attribute or not self.ffn.reads_alone:
            return ()
        names = [name for name in ("q_proj", "o_proj") if name in self.attention.names]
        return *map(self.linear, names), self.ffn.module

    @property
    def entry(self) -> nn.Module:
        """The first module inside the layer that sees its input.

        Not the layer itself: Transformers checkpoints a layer's ``forward``, and does not run its hooks again.
        """
        return getattr(self.module, first_child(self.module) or "input_layernorm", self.module)


def geometry(model: nn.Module) -> HeadGeometry:
    """The heads of the first layer whose attention is known."""
    found = next((layer.attention for layer in decoder_layers(model) if layer.attention), None)
    if found is None:
        raise UnsupportedModelError(f"no attention of {type(causal_lm(model)).__name__} is known")
    return found.heads


def check_config(config: Any) -> str:
    """The ``model_type``; refuses what no layout can help, from the config alone, before any weight is loaded."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_what(config)} is an encoder and a decoder; supported are causal language models, decoders alone"
        )
    return getattr(config, "model_type", None) or "unknown"


def check_text(config: Any) -> str:
    """The same for what has rows of text alone, as a run has."""
    family = check_config(config)
    if hasattr(config, "get_text_config") and config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{_what(config)} reads more than text, and a run has rows of text alone: take the family's text model, or "
            "use apply_sparselora in a Trainer that has the images (docs/models.md)"
        )
    return family


def _what(config: Any) -> str:
    architecture = ", ".join(getattr(config, "architectures", None) or ["this model"])
    return f"{architecture} (model_type {getattr(config, 'model_type', None)!r})"


def _stack(base: Any) -> tuple[str, nn.ModuleList] | None:
    """The decoder's list of layers and its path."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if decoder is base:
        decoder = getattr(base, getattr(base, "base_model_prefix", ""), base)
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = {
        name: child
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    }
    if len(lists) != 1:
        return None
    ((name, stack),) = lists.items()
    prefix = next(path for path, module in base.named_modules() if module is decoder)
    return f"{prefix}.{name}".lstrip("."), stack


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of a causal LM, each with what was found in it.

    Raises:
        UnsupportedModelError: an encoder-decoder, or no list of layers.
    """
    base: Any = causal_lm(model)
    config: Any = getattr(base, "config", None)
    check_config(config)
    found = _stack(base)
    if found is None:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no decoder with one list of its layers; load it as a causal language model"
        )
    path, stack = found
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [_layer(index, f"{path}.{index}", module, text) for index, module in enumerate(stack)]


def check_known(model: nn.Module, layers: list[DecoderLayer]) -> None:
    """Raises UnsupportedModelError, with the reasons, where no layer has anything that can be sparse."""
    if all(len(layer.missing) == len(GROUPS) for layer in layers):
        base: Any = causal_lm(model)
        reasons = "; ".join(f"{group}: {reason}" for group, reason in layers[0].missing.items())
        raise UnsupportedModelError(f"{_what(base.config)} is not supported: {layers[0].path} is not known ({reasons})")


def _layer(index: int, path: str, module: nn.Module, config: Any) -> DecoderLayer:
    ffn, attention, experts = find_ffn(module), find_attention(module, config), find_experts(module)
    missing: dict[str, str] = {}
    if isinstance(ffn, str):
        missing["ffn"] = ffn
    if isinstance(attention, str):
        missing |= dict.fromkeys(("qk", "vo"), attention)
    else:
        missing |= attention.missing
    if isinstance(experts, str):
        missing["experts"] = experts
    return DecoderLayer(
        index,
        path,
        module,
        ffn if isinstance(ffn, FFN) else None,
        attention if isinstance(attention, Attention) else None,
        experts if isinstance(experts, Experts) else None,
        missing,
    )


def check_causal(model: nn.Module) -> None:
    """Raises UnsupportedModelError, with the remedy, where the labels are not those of next tokens."""
    base: Any = causal_lm(model)
    if base.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no language model head, so its labels do not say which tokens are context: load "
            "the model with AutoModelForCausalLM, or train this one (a classifier, a reward model) with plain PEFT, "
            "without apply_sparselora"
        )
