"""The last decoder layer only where the loss reads logits: exact, also for plain LoRA.

Nothing comes after that layer but the LM head, which runs at label positions only (:mod:`.logits`). So its query, its
output projection and its FFN are computed at those positions; keys and values stay whole, because every position is
attended to. The rows are taken out before each of the three modules and put back, with zeros between them, after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .context import SparseContext


class TakeRows:
    """Forward pre-hook: ``(B, S, H) -> (1, n, H)``, the rows that the loss reads; n may be zero."""

    def __init__(self, context: SparseContext, layer: int) -> None:
        self.context, self.layer = context, layer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = self.context.wanted(self.layer)
        if wanted is None:
            return None
        return (args[0].flatten(0, -2).index_select(0, wanted.rows).unsqueeze(0), *args[1:])


class _PutRows(torch.autograd.Function):
    """The rows are no saved tensor: fetching one would start the layer's recomputation ahead of the engine's hooks."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        ctx.rows = rows
        whole = y.new_zeros(*shape, y.shape[-1])  # No view of something: a family may add to it in place.
        whole.flatten(0, -2).index_copy_(0, rows, y.squeeze(0))
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.flatten(0, -2).index_select(0, ctx.rows).unsqueeze(0), None, None


class PutRows:
    """Forward hook of the same module: ``(1, n, out) -> (B, S, out)``, zero at the other positions."""

    def __init__(self, context: SparseContext, layer: int) -> None:
        self.context, self.layer = context, layer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        wanted = self.context.wanted(self.layer)
        if wanted is None:
            return None
        if torch.compiler.is_compiling():
            whole = output.new_zeros(wanted.shape.numel(), output.shape[-1])
            return whole.index_copy(0, wanted.rows, output.squeeze(0)).view(*wanted.shape, output.shape[-1])
        return _PutRows.apply(output, wanted.rows, wanted.shape)


def trim(layer: int, modules: Iterable[nn.Module], context: SparseContext) -> list[Any]:
    """Switch it on for the last decoder layer's ``q_proj``, ``o_proj`` and ``mlp``.

    The layer's input must be watched by a :class:`~.hooks.LayerHook`, for recomputation.

    Returns:
        Handles whose ``remove()`` switches it off.
    """
    context.last_layer = layer
    handles: list[Any] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(TakeRows(context, layer)))
        handles.append(module.register_forward_hook(PutRows(context, layer)))
    return handles
