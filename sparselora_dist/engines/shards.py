"""Reading and replacing parameters without knowing which engine, if any, has sharded them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_zero3(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the parameter (``zero.Init`` or ``deepspeed.initialize``)."""
    return hasattr(parameter, "ds_id")


def is_initialized_zero3(model: nn.Module) -> bool:
    """Whether ``deepspeed.initialize`` has taken the model: its hooks know the modules that it saw."""
    return any(hasattr(parameter, "_z3_optimizer") for parameter in model.parameters())


def is_dtensor(parameter: Tensor) -> bool:
    """Whether the parameter is a DTensor, as FSDP2's are."""
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "placements")


@torch.no_grad()
def full_tensor(parameter: Tensor) -> Tensor:
    """The whole tensor. A collective where the parameter is sharded; then a copy of its own."""
    if is_zero3(parameter):
        from .zero3 import gather

        return gather(parameter)
    return parameter.full_tensor() if is_dtensor(parameter) else parameter.detach()


def shard_like(new: Iterable[nn.Parameter], old: Tensor) -> None:
    """Shard new parameters at once where ``old`` is partitioned by ZeRO-3, so that no rank keeps them whole."""
    if is_zero3(old):
        from .zero3 import partition_like

        partition_like(list(new), old)
