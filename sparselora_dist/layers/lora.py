"""Reading PEFT's LoRA layers: the frozen base, and the branches that are active now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LoRABranch:
    """``x -> B(A(dropout(x))) * scaling`` of one adapter; ``A`` (r, in), ``B`` (out, r)."""

    a: nn.Linear
    b: nn.Linear
    dropout: nn.Module
    scaling: float


def base_linear(module: nn.Module) -> nn.Module:
    """The frozen linear inside a LoRA layer, or the module itself where it carries no adapter."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def set_base_linear(parent: nn.Module, name: str, linear: nn.Module) -> None:
    """Put ``linear`` where :func:`base_linear` of ``parent.name`` was; a stored layout of our own cannot be merged into."""
    module = getattr(parent, name)
    if isinstance(module, LoraLayer):
        module.base_layer = linear
        if type(linear) is nn.Linear:
            module.__dict__.pop("merge", None)
        else:
            module.__dict__["merge"] = _refuse_merge
    else:
        setattr(parent, name, linear)


def _refuse_merge(*_: object, **__: object) -> None:
    raise ValueError("adapters cannot be merged into sparse layers: call remove_sparselora(model) first, then merge")


def active_branches(module: nn.Module) -> Iterator[LoRABranch]:
    """The LoRA branches that PEFT would add to the base output now: none if disabled or merged."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return
    for name in module.active_adapters:
        if name in module.lora_A:
            yield LoRABranch(module.lora_A[name], module.lora_B[name], module.lora_dropout[name], module.scaling[name])


def cast_input(x: Tensor, branch: LoRABranch) -> Tensor:
    """``x`` in the dtype of the adapter's weights, as PEFT does."""
    return x.to(branch.a.weight.dtype)
