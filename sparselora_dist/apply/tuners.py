"""Which of PEFT's methods may be on a sparse model: plain LoRA inside the sparse modules, most others beside them."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.lora import PLAIN_ONLY
from ..layouts import DecoderLayer, UnsupportedModelError


def check_methods(model: nn.Module) -> None:
    """Refuse what changes a forward as a whole.

    Raises:
        ValueError: prompt learning, whose virtual tokens are none of the labels'; X-LoRA, which runs the model twice.
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        method = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise ValueError(
                f"{method} puts tokens of its own before the batch's, and labels do not say what they are: {PLAIN_ONLY}"
            )
        if method == "XLORA":
            raise ValueError(
                f"X-LoRA runs the model twice in a forward and mixes the branches by token: {PLAIN_ONLY}; train its "
                "adapters sparsely one by one, and their mixture without apply_sparselora"
            )


def check_lora(where: str, module: Any) -> None:
    """Raises ValueError where what holds the frozen matrix called ``where`` is no plain LoRA layer."""
    if any(getattr(module, "use_dora", {}).values()) or getattr(module, "lora_variant", None):
        raise ValueError(f"{where} uses a LoRA variant ({_variants(module)}): {PLAIN_ONLY}")
    if isinstance(module, BaseTunerLayer) and type(module) is not Linear:
        raise ValueError(f"{where} carries a {_named(module)}: {PLAIN_ONLY}")


def other_methods(layers: list[DecoderLayer], error: UnsupportedModelError) -> UnsupportedModelError:
    """``error``, or one that says what hides the matrices that were looked for: another tuner around them."""
    for layer in layers:
        for name, module in layer.module.named_modules():
            where = f"{layer.path}.{name}"
            if isinstance(module, AuxiliaryTrainingWrapper):
                return UnsupportedModelError(
                    f"{where} is trained whole ({type(module).__name__}): {PLAIN_ONLY} ({error})"
                )
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
                return UnsupportedModelError(f"{where} carries a {_named(module)}: {PLAIN_ONLY} ({error})")
    return error


def _named(module: nn.Module) -> str:
    """``Linear of peft.tuners.vera``: many of PEFT's methods call their layer the same."""
    kind = type(module)
    if kind.__name__ == "ParamWrapper":
        return "ParamWrapper (target_parameters)"
    return f"{kind.__name__} of {'.'.join(kind.__module__.split('.')[:3])}"


def _variants(module: Any) -> str:
    found = {type(variant).__name__.removesuffix("Variant") for variant in getattr(module, "lora_variant", {}).values()}
    return ", ".join(sorted(found)).replace("DoraLinear", "DoRA") or "DoRA"
