"""FFNs: a module with a gate, an up and a down matrix, whatever it is called, that computes ``down(act(gate(x)) * up(x))``.

That it does is not believed of a name but tried: the family's own ``forward`` runs once on matrices of a few elements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from sparselora_kernels.activations import ACTIVATIONS, activation_name

from .names import is_linear, shape

# Children of an FFN, in the order gate, up, down.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_CANONICAL = ("gate_proj", "up_proj", "down_proj")
_FUNCTIONS = (functional.silu, functional.gelu, functional.relu)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True, slots=True)
class FFN:
    """Where the matrices of a gated FFN are."""

    path: str
    """Its name in the decoder layer: ``mlp``, or ``mlp.shared_expert`` of a mixture of experts."""
    parent: nn.Module
    """What holds it: the decoder layer, or the mixture of experts."""
    attribute: str
    """Its name there."""
    names: dict[str, str]
    """``gate_proj``, ``up_proj``, ``down_proj`` -> the child's own name."""
    activation: Callable[..., Any]

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


def find_ffn(layer: nn.Module) -> FFN | str:
    """The FFN of a decoder layer, or why there is none."""
    problems = []
    for path, parent in (("", layer), *((f"{name}.", child) for name, child in layer.named_children())):
        found = [_read(path + attribute, parent, attribute) for attribute in _children_with_matrices(parent)]
        problems += [problem for problem in found if isinstance(problem, str)]
        whole = [ffn for ffn in found if isinstance(ffn, FFN)]
        if len(whole) > 1:
            return f"it has {len(whole)} FFNs side by side ({', '.join(ffn.path for ffn in whole)})"
        if whole:
            return whole[0]
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    return problems[0] if problems else f"it has no FFN with {', '.join(_CANONICAL)}, but {children}"


def _children_with_matrices(parent: nn.Module) -> Iterator[str]:
    for attribute, child in parent.named_children():
        if not isinstance(child, nn.ModuleList) and _names_of(child):
            yield attribute


def _names_of(module: nn.Module) -> dict[str, str] | None:
    if known := getattr(module, "family_names", None):  # A sparse one.
        return known
    for names in _NAMES:
        if all(is_linear(getattr(module, name, None)) for name in names):
            return dict(zip(_CANONICAL, names))
    return None


def _read(path: str, parent: nn.Module, attribute: str) -> FFN | str:
    module: Any = getattr(parent, attribute)
    names = _names_of(module)
    assert names is not None
    what = f"its {path}, a {type(module).__name__},"
    gate, up, down = (shape(getattr(module, own)) for own in names.values())
    if not gate == up == down[::-1]:
        return f"{what} has matrices of {gate}, {up} and {down}, expected (width, hidden) twice and (hidden, width)"
    activation = next((getattr(module, name) for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    if activation is not None and activation_name(activation) is None:
        return f"{what} has the activation {activation}; known: {', '.join(ACTIVATIONS)}"
    # Where the forward names its activation, it has no attribute.
    for candidate in _FUNCTIONS if activation is None else (activation,):
        ffn = FFN(path, parent, attribute, names, candidate)
        if hasattr(module, "family_names") or _computes_as_expected(module, ffn):
            return ffn
    return f"{what} computes something else than down(act(gate(x)) * up(x))"


@torch.no_grad()
def _computes_as_expected(module: Any, ffn: FFN) -> bool:
    """Run the family's ``forward`` on small matrices in the place of its own."""
    if type(module).__module__.startswith("liger_kernel"):
        return True  # The same formula in kernels that a CPU cannot run.
    generator = torch.Generator().manual_seed(0)
    # Not initialised: that would draw from the caller's random numbers.
    options: dict[str, Any] = {"bias": False, "dtype": torch.float64}
    linears = [skip_init(nn.Linear, a, b, **options) for a, b in ((4, 6), (4, 6), (6, 4))]
    for linear in linears:
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator, dtype=torch.float64))
    gate, up, down = linears
    x = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    stand_in = copy.copy(module)
    stand_in.__dict__ = {**module.__dict__, "_modules": {**module._modules}}
    for name, linear in zip(ffn.names.values(), linears):
        stand_in._modules[name] = linear
    try:
        got = type(module).forward(stand_in, x)
    except Exception:
        return False
    expected = down(ffn.activation(gate(x)) * up(x))
    return isinstance(got, torch.Tensor) and got.shape == expected.shape and torch.allclose(got, expected)
