"""What the tests of applying share: a sparse tiny model, its outputs, all that applying could leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from sparselora_dist import SparseLoRAConfig, apply_sparselora

from .models import ALL_LINEAR, FAMILIES, batch, gradients, tiny_lora

LAYERS = {"ffn": {"0-2": 0.8}, "qk": {"1-2": 0.5}, "vo": {"1": 0.5}}
families = pytest.mark.parametrize("family", FAMILIES)


def config(**options: Any) -> SparseLoRAConfig:
    return SparseLoRAConfig.from_dict({"layers": LAYERS, **options})


def sparse_model(family: str = "llama", targets: list[str] | None = None, **options: Any) -> PeftModel:
    return apply_sparselora(tiny_lora(family, targets or ALL_LINEAR), config(**options))


def outputs(model: nn.Module, data: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step."""
    model.zero_grad()
    out = model(**(data or batch()))
    out.loss.backward()
    return out.logits.detach(), gradients(model)


def assert_identical(first: tuple, second: tuple) -> None:
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that applying could leave behind: modules, attributes, parameters, hooks."""
    hooks = {}
    for name, module in model.named_modules():
        kinds = [kind for kind in vars(module) if "hook" in kind]
        hooks[name] = {kind: len(getattr(module, kind) or ()) for kind in kinds if kind != "_is_full_backward_hook"}
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameters": [(n, p.shape, p.dtype, p.requires_grad, p.is_contiguous()) for n, p in model.named_parameters()],
        "state": list(model.state_dict()),
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks,
    }


def refuse(model: nn.Module, match: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """The error, and a model that is as it was."""
    parts = anatomy(model)
    with pytest.raises(error, match=match):
        apply_sparselora(model, config(**options))
    assert anatomy(model) == parts
