"""The mark of adapters that were trained under the zeros of a pruned base, on their configs: whoever saves one writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from ..io.marker import KEY, marked_config, marked_names


@dataclass
class MaskedLoraConfig(LoraConfig):
    """PEFT's config of an adapter whose layers are masked. PEFT writes every field of a config into its file."""

    sparse_base: dict[str, Any] | None = None
    """See :mod:`sparselora_dist.io.marker`."""


def mark_adapters(configs: Mapping[str, Any], masked: Mapping[str, LoraLayer]) -> None:
    """Mark the config of every adapter that has a masked layer; it stays marked, whatever becomes of the model.

    Args:
        configs: the model's ``peft_config``, by the adapter's name.
        masked: LoRA layers by the base model's names.

    Raises:
        ValueError: the config is of a class of its own.
    """
    found = {name: [path for path, layer in masked.items() if name in layer.lora_A] for name in configs}
    for name, modules in found.items():
        if modules and type(configs[name]) not in (LoraConfig, MaskedLoraConfig):
            raise ValueError(
                f"the config of adapter {name!r} is a {type(configs[name]).__name__}: sparse_base masks adapters of "
                "peft.LoraConfig"
            )
    for name, modules in found.items():
        if modules:
            config = configs[name]
            config.__class__ = MaskedLoraConfig
            config.sparse_base = marked_config({}, modules)[KEY]


def all_marked(configs: Iterable[Any]) -> list[str]:
    """Of several adapters together."""
    return sorted({name for config in configs for name in marked_names(config)})
