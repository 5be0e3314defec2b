"""Where the matrices of a decoder layer live in each supported model family.

Only names and shapes: the family's own attention and model code runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .method.channels import ATTENTION, HeadGeometry

# Families whose layers have the layout below and rotate-half RoPE over the whole head. Their differences (biases on
# q/k/v, RMS norm on q and k, sliding windows, any ratio of query to key/value heads) need nothing here.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModelError(ValueError):
    """The model's family or layout is not one that the sparse layers know."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer of a model."""

    index: int
    module: nn.Module
    """The layer itself; holds ``self_attn``, ``mlp`` and ``input_layernorm``."""

    @property
    def attention(self) -> nn.Module:
        return self.module.self_attn

    @property
    def mlp(self) -> nn.Module:
        return self.module.mlp

    @property
    def input_norm(self) -> nn.Module:
        """The first module that sees the layer's input."""
        return self.module.input_layernorm

    def matrix(self, name: str) -> nn.Module:
        """The frozen linear called ``name`` (``q_proj`` ... ``down_proj``)."""
        return base_linear(getattr(self.attention if name in ATTENTION else self.mlp, name))


def base_linear(module: Any) -> Any:
    """The frozen linear inside a LoRA layer of PEFT, or the module itself where it carries no adapter."""
    return module.base_layer if hasattr(module, "lora_A") else module


def matrix_name(layer: int, name: str) -> str:
    """Canonical name of a frozen matrix, ``layers.3.mlp.gate_proj``: what factor files and messages use."""
    return f"layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def geometry(model: nn.Module) -> HeadGeometry:
    """Attention shape from the model's config."""
    config = causal_lm(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return HeadGeometry(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=head_dim)


def check_family(config: Any) -> str:
    """The ``model_type`` of a supported family; refuses others from the config alone, before any weight is loaded."""
    family = getattr(config, "model_type", None)
    if family not in SUPPORTED:
        architecture = ", ".join(getattr(config, "architectures", None) or ["this model"])
        raise UnsupportedModelError(
            f"{architecture} (model_type {family!r}) is not supported; supported families: {', '.join(SUPPORTED)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(
            f"{family} with partial_rotary_factor {partial}: a qk channel is a rotary pair of the whole head"
        )
    return family


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of a supported model, checked.

    Raises:
        UnsupportedModelError: an unknown family, or a layer that is not laid out as its family's; both named.
    """
    base = causal_lm(model)
    config: Any = getattr(base, "config", None)
    family = check_family(config)
    stack = getattr(getattr(base, "model", None), "layers", None)
    if stack is None:
        raise UnsupportedModelError(f"{type(base).__name__} has no 'model.layers'; load it as a causal language model")
    layers = [DecoderLayer(index, module) for index, module in enumerate(stack)]
    heads, hidden = geometry(model), config.hidden_size
    for layer in layers:
        for problem in _problems(layer, heads, hidden, config.intermediate_size):
            raise UnsupportedModelError(f"unsupported layout in {family}: layers.{layer.index}.{problem}")
    return layers


def check_causal(model: nn.Module) -> None:
    """Raises UnsupportedModelError, with the remedy, where the labels are not those of next tokens."""
    base: Any = causal_lm(model)
    if base.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no language model head, so its labels do not say which tokens are context: load "
            "the model with AutoModelForCausalLM, or train this one (a classifier, a reward model) with plain PEFT, "
            "without apply_sparselora"
        )


def _problems(layer: DecoderLayer, heads: HeadGeometry, hidden: int, width: int) -> Iterator[str]:
    q, kv = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    shapes = {
        "self_attn": {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)},
        "mlp": {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)},
    }
    if not hasattr(layer.module, "input_layernorm"):
        yield "input_layernorm is missing"
    for part, matrices in shapes.items():
        parent = getattr(layer.module, part, None)
        if parent is None:
            yield f"{part} is missing"
            continue
        if part == "mlp" and not hasattr(parent, "act_fn"):
            yield "mlp.act_fn is missing"
        for name, shape in matrices.items():
            linear = base_linear(getattr(parent, name, None))
            if linear is None:
                yield f"{part}.{name} is missing"
            elif type(linear) is not nn.Linear and not getattr(type(linear), "stands_for_linear", False):
                yield f"{part}.{name} is a {type(linear).__name__}, expected torch.nn.Linear"
            elif (linear.out_features, linear.in_features) != shape:
                yield f"{part}.{name} is {(linear.out_features, linear.in_features)}, expected {shape}"
