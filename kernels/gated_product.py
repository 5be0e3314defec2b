"""The product in the middle of a dense gated FFN, ``H = act(G) · U``, in one launch forward and one backward on a GPU.

What is kept for backward is G and U. On a CPU torch's own two operations are as fast, and are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import activate, activate_backward
from .backend import use_triton
from .operator import register, register_with_gradient


def _one_launch(x: Tensor) -> bool:
    """The kernels compute in fp32."""
    return use_triton(x) and x.dtype != torch.float64


def product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) · up``, without autograd."""
    if _one_launch(gate):
        from .gpu.gated_gradient import gated_product as triton_product

        return triton_product(gate, up, activation)
    return activate(activation, gate).mul_(up)


def product_gradient(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, from that of their product; all three of one dtype and shape."""
    if _one_launch(grad):
        from .gpu.gated_gradient import gated_backward

        return gated_backward(grad, gate, up, activation)
    return activate_backward(activation, gate, grad * up), activate(activation, gate).mul_(grad)


def _gradient_fake(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


_run_backward = register("gated_product_backward", product_gradient, _gradient_fake)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return *_run_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation), None


_run = register_with_gradient(
    "gated_product", product, lambda gate, up, _: torch.empty_like(gate), keep=_keep, gradients=_gradients
)


def gated_product(gate: Tensor, up: Tensor, activation: str, *, compact: bool = False) -> Tensor:
    """``act(gate) · up``, rounded once where a GPU computes it; exact gradients for both.

    Args:
        gate, up: of one shape and dtype.
        activation: a name that :func:`sparselora_kernels.activations.activate` knows.
        compact: keep no more than gate and up for backward on a CPU too.

    Returns:
        Of their shape and dtype.
    """
    if not compact and not _one_launch(gate):
        return activate(activation, gate) * up
    return _run(gate.contiguous(), up.contiguous(), activation)
