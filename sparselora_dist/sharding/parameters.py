"""Reading and replacing parameters without knowing which engine, if any, has sharded them.

A parameter is recognised by what it carries: neither DeepSpeed nor FSDP2 is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        return _gather_zero3(parameter)
    return parameter.full_tensor() if is_dtensor(parameter) else parameter.detach()


def _gather_zero3(parameter: Any) -> Tensor:
    """By the methods that ``zero.Init`` has put on the parameter; one that is whole already stays whole."""
    gathered = parameter.ds_status.name == "AVAILABLE"
    if not gathered:
        parameter.all_gather()
    try:
        return parameter.detach().clone()
    finally:
        if not gathered:
            parameter.partition()


def shard_like(new: Iterable[nn.Parameter], old: Any) -> None:
    """Shard new parameters at once where ``old`` is partitioned by ZeRO-3, so that no rank keeps them whole."""
    if is_zero3(old):
        old.convert_to_zero_parameters(param_list=list(new))


@torch.no_grad()
def distribute_like(value: Tensor, target: Any) -> Tensor:
    """A copy of ``value`` (whole, CPU) with the device, dtype and sharding of ``target``."""
    if not is_dtensor(target):
        return value.to(target.device, target.dtype, copy=True)
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(target.device, target.dtype)
    # Every rank has the value: none is sent.
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to(target.device)
