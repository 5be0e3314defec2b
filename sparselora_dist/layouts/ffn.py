"""FFNs of a decoder layer, whatever they are called: gated, with gate and up apart or in one matrix, and without a gate.

What a module computes is not believed of a name but tried (:mod:`.tried`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn import functional

from sparselora_kernels.activations import ACTIVATIONS, activation_name

from .names import Parts, is_linear, shape
from .tried import computes_gated, computes_plain, fused_order

Kind = Literal["gated", "plain"]

# Children of an FFN: gate, up, down; or what comes before the activation, and what comes after it.
_THREE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_TWO = (
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("input_linear", "output_linear"),
)
_CANONICAL = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")
_FUNCTIONS = (functional.silu, functional.gelu, functional.relu)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")


@dataclass(frozen=True, slots=True)
class FFN:
    """Where the matrices of an FFN are."""

    path: str
    """Its name in the layer: ``mlp``, ``mlp.shared_expert`` of a mixture of experts; empty where it is the layer itself."""
    parent: nn.Module
    """What holds it: the decoder layer, or the mixture of experts."""
    attribute: str
    """Its name there; empty where it is the decoder layer."""
    kind: Kind
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``."""
    names: dict[str, str]
    """``gate_proj``, ``up_proj`` or ``gate_up_proj``, and ``down_proj`` -> the child's own name."""
    parts: Parts
    """Where ``gate_proj`` and ``up_proj`` are, of whose factors scores are made."""
    activation: Callable[..., Any]
    reads_alone: bool = True
    """Whether its module is given the hidden states and nothing else."""

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.attribute) if self.attribute else self.parent

    @classmethod
    def gated(cls, path: str, parent: nn.Module, names: tuple[str, str, str], activation: Callable[..., Any]) -> FFN:
        """With gate, up and down apart, called ``names`` in ``parent``'s child at the end of ``path``."""
        apart: Parts = {name: (name, None) for name in _CANONICAL[:2]}
        return cls(path, parent, path.rpartition(".")[2], "gated", dict(zip(_CANONICAL, names)), apart, activation)


def find_ffn(layer: nn.Module) -> FFN | str:
    """The FFN of a decoder layer, or why there is none."""
    problems = []
    for path, parent in (("", layer), *((f"{name}.", child) for name, child in layer.named_children())):
        found = [_read(path + attribute, parent, attribute) for attribute in _children_with_matrices(parent)]
        if parent is layer and _names_of(layer):
            found.append(_read("", layer, ""))
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


def _names_of(module: nn.Module) -> tuple[str, ...] | None:
    """The children that are its matrices."""
    if known := getattr(module, "family_names", None):  # A sparse one.
        return tuple(known.values())
    found = (names for names in (*_THREE, *_TWO) if all(is_linear(getattr(module, name, None)) for name in names))
    return next(found, None)


def _read(path: str, parent: nn.Module, attribute: str) -> FFN | str:
    module: Any = getattr(parent, attribute) if attribute else parent
    own = _names_of(module)
    assert own is not None
    if names := getattr(module, "family_names", None):
        return FFN(path, parent, attribute, "gated", names, module.family_parts, module.act_fn)
    what = f"its {path or 'layer'}, a {type(module).__name__},"
    first, *_, down = shapes = [shape(getattr(module, name)) for name in own]
    fused = len(own) == 2 and first == (2 * down[1], down[0])
    if not fused and any(found != down[::-1] for found in shapes[:-1]):
        return (
            f"{what} has matrices {', '.join(own)} of {', '.join(map(str, shapes))} (out, in), which do not fit an FFN"
        )
    activation = next((getattr(module, name) for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    # Where the forward names its activation, it has no attribute.
    candidates = _FUNCTIONS if activation is None else (activation,)
    if len(own) == 2 and not fused:
        names = dict(zip(_CANONICAL[1:], own))
        for candidate in candidates:
            if reads := computes_plain(module, own, candidate):
                parts: Parts = {"up_proj": ("up_proj", None)}
                return FFN(path, parent, attribute, "plain", names, parts, candidate, reads == "alone")
        return f"{what} computes something else than down(act(up(x)))"
    if activation is not None and activation_name(activation) is None:
        return f"{what} has the activation {activation}; known: {', '.join(ACTIVATIONS)}"
    for candidate in candidates:
        if fused:
            order = fused_order(module, own, candidate)
            if order is not None:
                width = down[1]
                halves = (slice(0, width), slice(width, 2 * width))
                parts = {name: ("gate_up_proj", rows) for name, rows in zip(order, halves)}
                return FFN(path, parent, attribute, "gated", dict(zip(_FUSED, own)), parts, candidate)
        elif computes_gated(module, own, candidate):
            gate, up, down_name = own
            return FFN.gated(path, parent, (gate, up, down_name), candidate)
    return f"{what} computes something else than down(act(gate(x)) * up(x))"
