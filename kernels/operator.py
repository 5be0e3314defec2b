"""Registered operations: PyTorch's tracers see one node each, and eager code goes straight to the implementation.

A call through PyTorch's dispatcher costs some 0.2 ms of host time, several times what the operations themselves need;
with a few hundred of them in a step that would be the step at short sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_traced(x: Tensor) -> bool:
    """Whether a tracer is at work: tensors that stand for others are of another type."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def hold(ctx: Any, name: str, tensors: Sequence[Tensor | None]) -> None:
    """Keep for backward what needs no gradient and no copy: frozen parts, index lists.

    Not as saved tensors: those are what checkpointing computes again, up to the last one of a layer. As attributes one by
    one, where whoever looks through a graph finds them.
    """
    setattr(ctx, name, len(tensors))
    for number, tensor in enumerate(tensors):
        setattr(ctx, f"{name}_{number}", tensor)


def held(ctx: Any, name: str) -> list[Any]:
    """What :func:`hold` kept."""
    return [getattr(ctx, f"{name}_{number}") for number in range(getattr(ctx, name))]


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``sparselora::name``, which carries no gradient; returns what eager code and tracers call."""
    operator = torch.library.custom_op(f"sparselora::{name}", implementation, mutates_args=())
    operator.register_fake(fake)

    def call(x: Tensor, *inputs: Any) -> Any:
        return operator(x, *inputs) if is_traced(x) else implementation(x, *inputs)

    return call


def register_with_gradient(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    keep: Callable[[Any, tuple, Any], None],
    gradients: Callable[..., tuple],
) -> Callable[..., Any]:
    """Register ``sparselora::name``; returns what eager code and tracers call.

    Args:
        forward, fake: of the operation.
        keep: ``(ctx, inputs, output)``, saves what the gradient needs.
        gradients: ``(ctx, *grads)``, one gradient per input, a list for a list of tensors.
    """
    operator = torch.library.custom_op(f"sparselora::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(gradients, setup_context=keep)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            keep(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            # The lists hold frozen parts, which this kind of function does not follow.
            return tuple(None if isinstance(grad, list) else grad for grad in gradients(ctx, *grads))

    Direct.__name__ = name

    def call(x: Tensor, *inputs: Any) -> Any:
        return operator(x, *inputs) if is_traced(x) else Direct.apply(x, *inputs)

    return call
