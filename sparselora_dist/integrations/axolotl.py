"""A plugin for Axolotl: a ``sparse_lora`` section in its YAML.

plugins:
  - sparselora_dist.integrations.axolotl.SparseLoRAPlugin
sparse_lora:
  layers: {ffn: {"3-30": 0.99}}

Axolotl is imported by whoever names the plugin, never by this package.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, field_validator
from torch import nn
from transformers import TrainerCallback

from ..apply import apply_sparselora, find_state
from ..config.sparse import SparseLoRAConfig
from .trainer import SparseLoRACallback

_AUTOMATIC = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""Axolotl's LoRA kernels, which it switches on by itself where the YAML is silent."""
_REPLACING = (
    *_AUTOMATIC,
    "liger_glu_activation",
    "liger_swiglu",
    "liger_fused_linear_cross_entropy",
    "cut_cross_entropy",
)
"""What puts forwards of its own in the place of modules that are sparse, or of the loss at label positions."""


class SparseLoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    sparse_lora: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"description": "The sparse_lora section of sparselora-dist"}
    )

    @field_validator("sparse_lora")
    @classmethod
    def check_section(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            SparseLoRAConfig.from_dict(value)
        return value


class SparseLoRAPlugin(BasePlugin):
    """Named under ``plugins``; without a ``sparse_lora`` section it does nothing."""

    def register(self, cfg: Any) -> None:
        """The YAML as it was written, before Axolotl fills it in.

        Raises:
            ValueError: it asks for something that would compute the sparse modules densely.
        """
        if not cfg.get("sparse_lora"):
            return
        if found := [key for key in _REPLACING if cfg.get(key)]:
            raise ValueError(
                f"sparse_lora with {', '.join(found)}: these compute the sparse modules, or the loss, in a way of their "
                "own; remove them"
            )
        for key in _AUTOMATIC:
            cfg[key] = False

    def get_input_args(self) -> str:
        return f"{SparseLoRAArgs.__module__}.{SparseLoRAArgs.__qualname__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """The model has its adapter and is where it computes; no engine has it yet.

        Raises:
            ConfigError, UnsupportedModelError, ValueError: as :func:`apply_sparselora`.
        """
        section = cfg.get("sparse_lora")
        if section:
            apply_sparselora(model, SparseLoRAConfig.from_dict(_plain(section)))

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[TrainerCallback]:
        return [SparseLoRACallback()] if find_state(model) is not None else []


def _plain(value: Any) -> Any:
    """Axolotl's dictionaries answer None for every name; these are usual ones."""
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value
