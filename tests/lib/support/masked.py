"""Tiny models with half of their decoder's weights zero, and what a masked LoRA layer is, as it is written down."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from sparselora_dist.pruning.pattern import Pattern

from .models import ALL_LINEAR, tiny_lora
from .pruned_workers import prune_decoder


class FormulaLinear(nn.Module):
    """``linear(x, (W + sBA) ⊙ M)``; keeps the names of its parameters."""

    def __init__(self, layer: Any, straight: bool) -> None:
        super().__init__()
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scaling, self.straight = layer.scaling["default"], straight
        self.register_buffer("weight", layer.base_layer.weight.detach().clone())
        self.bias = layer.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        whole = self.weight + self.scaling * self.lora_B["default"].weight @ self.lora_A["default"].weight
        masked = whole * (self.weight != 0)
        if not self.straight:
            return nn.functional.linear(x, masked, self.bias)
        # The value and the input gradient of one, the factors' gradients of the other.
        y = nn.functional.linear(x, masked.detach(), self.bias)
        branch = nn.functional.linear(x.detach(), whole)
        return y + branch - branch.detach()


def pruned_lora(family: str = "llama", targets: list[str] | None = None, **options: Any) -> PeftModel:
    """A tiny PEFT model on a base that was pruned to one half by magnitude; B is not zero."""
    model = tiny_lora(family, targets or ALL_LINEAR, **options)
    prune_decoder(model, Pattern.share(0.5))
    return model


def formula(model: PeftModel, straight: bool = False) -> PeftModel:
    """The same, by :class:`FormulaLinear`."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, FormulaLinear(module, straight))
    return plain


def base_weights(model: Any) -> dict[str, Tensor]:
    """Copies of the decoder's frozen matrices by the base model's names."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name and not parameter.requires_grad:
            weights[name.removeprefix("base_model.model.").replace(".base_layer", "")] = parameter.detach().clone()
    return weights


def lost(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Positions that were zero and are not."""
    assert before.keys() <= after.keys()
    return sum(int(((weight == 0) & (after[name] != 0)).sum()) for name, weight in before.items())
