"""The hooks that tell a model's sparse context where a forward begins and ends, and which layer runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .context import SparseContext


class BeginHook:
    """Forward pre-hook of the model: labels become the token partition."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.context.in_forward:
            return
        labels, shifted = kwargs.get("labels"), False
        if labels is None and kwargs.get("shift_labels") is not None:
            labels, shifted = kwargs["shift_labels"], True
        self.context.sync.check()
        self.context.begin(labels, kwargs.get("attention_mask"), module.training, shifted, opened_by=module)


class FinishHook:
    """Forward hook of the module that opened the micro-batch."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.context.finish(module)


class LayerHook:
    """Forward pre-hook of a decoder layer's first norm: remembers, or recognises, the layer's input."""

    def __init__(self, context: SparseContext, layer: int) -> None:
        self.context, self.layer = context, layer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() or self.context.in_forward:
            self.context.enter_layer(self.layer, args[0])
