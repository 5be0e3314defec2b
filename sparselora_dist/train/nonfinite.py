"""On which rank a gradient that is not finite arose: a step's backward once more, looked at before the ranks add up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..engines import Engine
from ..layouts import decoder_layers


def own_nonfinite(engine: Engine, repeat: Callable[[], Any]) -> list[str]:
    """Parameters of the decoder layers whose gradients on this rank alone, before any sum, are not finite.

    Args:
        engine: holds the model, whose gradients are of no use any more.
        repeat: does the forwards and backwards of the step again; all ranks call this.
    """
    found: dict[str, None] = {}

    def look(name: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            found[name] = None

    def entered(index: int, layer: nn.Module, _: Any) -> None:
        # Behind the engine's own hook, which has made the parameters whole: these are the ones that backward reaches.
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(look, f"layers.{index}.{name}"))

    handles = [
        layer.module.register_forward_pre_hook(partial(entered, layer.index)) for layer in decoder_layers(engine.module)
    ]
    try:
        repeat()
    finally:
        for handle in handles:
            handle.remove()
    return list(found)
