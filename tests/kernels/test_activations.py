"""Activations by name: the right name for a module, the right function and slope for a name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

import sparselora_kernels as kernels
import sparselora_kernels.reference
from sparselora_kernels.activations import ACTIVATIONS, activate, activate_backward, activation_name

NAMED: dict[str, Any] = {
    "nn.SiLU": nn.SiLU(),
    "nn.GELU": nn.GELU(),
    "nn.GELU tanh": nn.GELU(approximate="tanh"),
    "nn.ReLU": nn.ReLU(),
    "functional.silu": functional.silu,
    "functional.gelu": functional.gelu,
    "functional.gelu tanh": partial(functional.gelu, approximate="tanh"),
    "torch.relu": torch.relu,
}
HUGGING_FACE = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "gelu_fast")
OTHERS: list[Any] = [
    *(ACT2FN[name] for name in ("quick_gelu", "relu2", "gelu_10", "mish", "linear", "tanh")),
    lambda x: x * x,
    type("MySiLU", (nn.SiLU,), {})(),
    partial(functional.leaky_relu, negative_slope=0.2),
]


KNOWN = NAMED | {name: ACT2FN[name] for name in HUGGING_FACE}


@pytest.mark.parametrize("activation", KNOWN.values(), ids=KNOWN)
def test_the_name_computes_what_the_module_computes(activation: Any) -> None:
    x = torch.linspace(-8, 8, 1001)
    name = activation_name(activation)
    assert name in ACTIVATIONS
    torch.testing.assert_close(activate(name, x), activation(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", OTHERS, ids=lambda a: type(a).__name__)
def test_others_have_no_name_and_are_still_scored(activation: Any) -> None:
    assert activation_name(activation) is None
    x, rows = torch.randn(9, 7), torch.arange(1, 8)
    gate, up = [(torch.randn(3, 7), torch.randn(5, 3)) for _ in range(2)]
    expected = kernels.reference.gated_ffn_score(x, rows, gate, up, activation)
    torch.testing.assert_close(kernels.gated_ffn_score(x, rows, gate, up, activation), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_derivative(name: str) -> None:
    x = torch.cat([torch.linspace(-6, 6, 100), torch.zeros(1)]).double().requires_grad_()
    grad = torch.randn(101).double()
    (expected,) = torch.autograd.grad(activate(name, x), x, grad)
    torch.testing.assert_close(activate_backward(name, x.detach(), grad), expected)


def test_unknown_names_are_refused() -> None:
    for function in (activate, partial(activate_backward, grad=torch.ones(1))):
        with pytest.raises(ValueError, match="unknown activation 'tanh'"):
            function("tanh", x=torch.ones(1))
