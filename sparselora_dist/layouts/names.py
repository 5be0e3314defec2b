"""What the parts of a model are called here, whatever their family calls them."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn

from ..method.channels import ATTENTION

Rows: TypeAlias = "slice | Tensor"
"""Rows of a stored matrix: one after another, or (n,) int64 on the CPU."""
Parts: TypeAlias = dict[str, tuple[str, "Rows | None"]]
"""Matrix that something is asked of -> the one that is stored, and its rows there; ``None``: it is stored by itself."""


class UnsupportedModelError(ValueError):
    """The model's layout is not one that the sparse layers know."""


def base_linear(module: Any) -> Any:
    """The frozen linear inside a LoRA layer of PEFT, or the module itself where it carries no adapter."""
    return module.base_layer if hasattr(module, "lora_A") else module


def is_linear(module: Any) -> bool:
    """Whether it is a linear, with or without a LoRA layer around it."""
    return isinstance(base_linear(module), nn.Linear)


def shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear."""
    linear = base_linear(module)
    return linear.out_features, linear.in_features


def matrix_name(layer: int, name: str) -> str:
    """Canonical name of a frozen matrix, ``layers.3.mlp.gate_proj``: what factor files and messages use."""
    return f"layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
