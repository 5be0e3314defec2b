"""The activations that the kernels know, by name: ``silu``, ``gelu`` (erf), ``gelu_tanh``, ``relu``.

Kernels take a name because a compiled kernel cannot call Python; :func:`activation_name` finds it for a module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: tuple[str, ...] = ("silu", "gelu", "gelu_tanh", "relu")

_MODULES = {nn.SiLU: "silu", nn.ReLU: "relu"}
_FUNCTIONS: dict[Any, str] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
    torch.relu: "relu",
}
# transformers' modules by class name, as this package does not import it. All tanh forms are one formula.
_TRANSFORMERS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}


def activation_name(activation: Callable[..., Any]) -> str | None:
    """The name of a module or function of torch, or of a module of transformers; ``None`` for any other."""
    kind = type(activation)
    if isinstance(activation, nn.GELU):
        return _gelu(activation.approximate) if kind is nn.GELU else None
    if isinstance(activation, functools.partial):
        options = dict(activation.keywords)
        approximate = options.pop("approximate", "none")
        return _gelu(approximate) if activation.func is functional.gelu and not (options or activation.args) else None
    if kind.__module__.partition(".")[0] == "transformers":
        return _TRANSFORMERS.get(kind.__name__)
    return _FUNCTIONS.get(activation) if kind not in _MODULES else _MODULES[kind]


def _gelu(approximate: str) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def check_activation(name: str) -> None:
    """Raises ValueError unless ``name`` is one of :data:`ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def activate(name: str, x: Tensor) -> Tensor:
    """``act(x)``, of ``x``'s shape and dtype.

    Raises:
        ValueError: ``name`` is not one of :data:`ACTIVATIONS`.
    """
    if name == "silu":
        return functional.silu(x)
    if name in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    check_activation(name)
    return functional.relu(x)


def activate_backward(name: str, x: Tensor, grad: Tensor) -> Tensor:
    """``grad · act'(x)``; relu has slope 0 at 0.

    Raises:
        ValueError: ``name`` is not one of :data:`ACTIVATIONS`.
    """
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")
    check_activation(name)
    return torch.ops.aten.threshold_backward(grad, x, 0)
