"""An adapter's fp32 master in the dtype of autocast: cast in the forward, and not again when a layer is recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.linear import compute_input


class _AsCast(torch.autograd.Function):
    """The cast of a master, as its differentiable function."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return cast.view_as(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


class CastOnce:
    """The casts of one parameter.

    A forward always casts anew, because not every way to change a parameter counts its version. What it made is held for
    one recomputation, in the backward, if the parameter is then what it was; so nothing is held from step to step.
    """

    def __init__(self) -> None:
        self._held: tuple[int, int, Tensor] | None = None

    def __call__(self, master: Tensor) -> Tensor:
        """``master`` in the dtype that autocast asks for; itself where it has it."""
        held, self._held = self._held, None
        if not torch.is_autocast_enabled(master.device.type):
            return master
        dtype = torch.get_autocast_dtype(master.device.type)
        if master.dtype == dtype:
            return master
        mark = master._version, master.data_ptr()
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing and held is not None and held[:2] == mark and held[2].dtype == dtype:
            return _AsCast.apply(master, held[2])
        with torch.no_grad():
            cast = compute_input(master)
        if not recomputing:
            self._held = *mark, cast
        return _AsCast.apply(master, cast)
