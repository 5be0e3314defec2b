"""The routed experts of a mixture: one module with all their matrices, that computes Σ_k w_k · down_e(gate(gate_up_e(x))).

As Transformers 5 has them: ``gate_up_proj`` (E, 2W, H) and ``down_proj`` (E, H, W), or both transposed, gate and up one
after the other or in turns, with or without biases. What stands between gate_up and down is the family's own; only that it
works channel by channel is needed. All of it is tried: the family's ``forward`` runs once on matrices of a few elements.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparselora_kernels.activations import activation_name

_BIASES = ("gate_up_proj_bias", "down_proj_bias")
# Of the stand-in, all different: experts, hidden, width.
_E, _H, _W = 3, 4, 6
_COUNTS = {"num_experts": _E, "num_local_experts": _E}
_SIZES = {"hidden_dim": _H, "hidden_size": _H, "intermediate_dim": _W, "intermediate_size": _W, "expert_dim": _W}


@dataclass(frozen=True, slots=True)
class Experts:
    """Where the experts are, and how the family lays their matrices out."""

    path: str
    """Their name in the decoder layer: ``mlp.experts``."""
    parent: nn.Module
    attribute: str
    """Their name there."""
    count: int
    """E."""
    width: int
    """W, neurons of one expert."""
    hidden: int
    """H."""
    transposed: bool
    """``gate_up_proj`` is (E, H, 2W) and ``down_proj`` (E, W, H)."""
    interleaved: bool
    """Gate and up take turns along 2W; otherwise all of gate comes first."""
    activation: str | None
    """Of ``act(gate) * up``, the name that kernels know; ``None``: the family's own ``_apply_gate``."""

    @property
    def outer(self) -> Any:
        """What stands in the layer: PEFT's wrappers, where adapters target the parameters, around :attr:`module`."""
        return getattr(self.parent, self.attribute)

    @property
    def wrappers(self) -> list[Any]:
        """PEFT's, from the outermost on."""
        return list(_wrappers(self.outer))

    @property
    def module(self) -> Any:
        return innermost(self.outer)

    def replace(self, module: nn.Module) -> None:
        """Put ``module`` where the experts were, inside PEFT's wrappers."""
        wrappers = self.wrappers
        if wrappers:
            wrappers[-1].base_layer = module
        else:
            setattr(self.parent, self.attribute, module)

    # --- gate_up, down and their biases, as the family has them and as rows of channels

    def gate_up_rows(self, values: Tensor) -> Tensor:
        """``gate_up_proj`` -> (E·2W, H): of each expert the rows of gate, then those of up. A view where it can be."""
        return self.first_last(values.transpose(1, 2) if self.transposed else values).reshape(-1, self.hidden)

    def gate_up_family(self, rows: Tensor) -> Tensor:
        """The way back, contiguous."""
        values = rows.view(self.count, -1, self.hidden)
        if self.interleaved:
            values = values.view(self.count, 2, self.width, self.hidden).transpose(1, 2).reshape(values.shape)
        return (values.transpose(1, 2) if self.transposed else values).contiguous()

    def down_rows(self, values: Tensor) -> Tensor:
        """``down_proj`` -> (E·W, H)."""
        return (values if self.transposed else values.transpose(1, 2)).reshape(-1, self.hidden)

    def down_family(self, rows: Tensor) -> Tensor:
        """The way back, contiguous."""
        values = rows.view(self.count, self.width, self.hidden)
        return (values if self.transposed else values.transpose(1, 2)).contiguous()

    def first_last(self, values: Tensor) -> Tensor:
        """(E, 2W, ...) as the family has it -> gate first, then up."""
        if not self.interleaved:
            return values
        split = values.unflatten(1, (self.width, 2))
        return split.transpose(1, 2).flatten(1, 2)


BY_ROWS = "matrices_by_rows"
"""Of a family's module whose matrices a run has loaded by rows of channels: these, by the parameter's name."""


def placeholder(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """In the place of such a parameter, for who asks for its shape, dtype and device: of one element, not a number."""
    one = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    return nn.Parameter(one.expand(shape), requires_grad=False)


def innermost(module: Any) -> Any:
    """Without PEFT's wrappers around it."""
    return ([module] + [wrapper.base_layer for wrapper in _wrappers(module)])[-1]


def _wrappers(module: Any) -> Iterator[Any]:
    while hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        yield module
        module = module.base_layer


def combined(module: Any, activation: str | None, interleaved: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """What the family does between gate_up and down: ``(gate (n, w), up (n, w)) -> (n, w)``, for any w."""

    def own(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        return type(module)._apply_gate(module, both)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return module.act_fn(gate) * up

    return plain if activation is not None or not hasattr(module, "_apply_gate") else own


def find_experts(layer: nn.Module) -> Experts | str:
    """The routed experts of a decoder layer, or why there are none that can be sparse."""
    found: list[Experts | str] = []
    for name, module in layer.named_modules():
        path = name.removesuffix(".base_layer")
        if name != path or not name:
            continue  # Inside PEFT's wrappers: seen from outside.
        inner = innermost(module)
        if getattr(inner, "is_sparse_experts", False):
            found.append(dataclasses.replace(inner.layout, path=path, **_slot(layer, path)))
        elif _is_bank(inner):
            found.append(_read(layer, path, inner))
        elif name.rpartition(".")[2] == "experts":
            found.append(_strange(path, module))
    whole = [one for one in found if isinstance(one, Experts)]
    if len(whole) > 1:
        return f"it has {len(whole)} banks of experts ({', '.join(one.path for one in whole)})"
    if whole:
        return whole[0]
    return next((one for one in found if isinstance(one, str)), "it has no routed experts")


def _slot(layer: nn.Module, path: str) -> dict[str, Any]:
    parent, _, attribute = path.rpartition(".")
    return {"parent": layer.get_submodule(parent), "attribute": attribute}


def _is_bank(module: nn.Module) -> bool:
    three = [name for name, p in module._parameters.items() if p is not None and len(_shape(p)) == 3]
    return any("proj" in name for name in three) or bool(three and "Expert" in type(module).__name__)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _strange(path: str, module: nn.Module) -> str:
    what = f"its {path} is a {type(module).__name__}"
    if isinstance(module, nn.ModuleList):
        what += f" of {len(module)} {type(next(iter(module), None)).__name__}"
    return f"{what}, where one module with the parameters gate_up_proj and down_proj of all experts is known"


def _read(layer: nn.Module, path: str, module: Any) -> Experts | str:
    what = f"its {path}, a {type(module).__name__},"
    shapes = {name: _shape(p) for name, p in module.named_parameters()}
    lacking = [name for name in ("gate_up_proj", "down_proj") if name not in shapes]
    if lacking:
        return f"{what} has no parameter {lacking[0]}, but {', '.join(shapes)}"
    if strange := [name for name in shapes if name not in ("gate_up_proj", "down_proj", *_BIASES)]:
        return f"{what} also has {', '.join(strange)}"
    gate_up, down = shapes["gate_up_proj"], shapes["down_proj"]
    if len(down) != 3 or gate_up not in ((down[0], 2 * down[2], down[1]), (down[0], down[2], 2 * down[1])):
        return f"{what} has matrices of {gate_up} and {down}, expected (E, 2W, H) and (E, H, W) or both transposed"
    transposed = gate_up[1] == down[2]
    count, width, hidden = down if transposed else (down[0], down[2], down[1])
    interleaved = not getattr(module, "is_concatenated", True)
    name = activation_name(module.act_fn) if callable(getattr(module, "act_fn", None)) else None
    slot = _slot(layer, path)
    for activation in dict.fromkeys((name, None)):
        experts = Experts(
            path,
            **slot,
            count=count,
            width=width,
            hidden=hidden,
            transposed=transposed,
            interleaved=interleaved,
            activation=activation,
        )
        if (activation or hasattr(module, "_apply_gate")) and _computes_as_expected(module, experts, set(shapes)):
            return experts
    return f"{what} computes something else than the sum over k of w_k * down_e(gate(gate_up_e(x))), channel by channel"


@torch.no_grad()
def _computes_as_expected(module: Any, experts: Experts, names: set[str]) -> bool:
    """Run the family's ``forward``, and not another implementation of it, on small matrices in the place of its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    small = dataclasses.replace(experts, count=_E, width=_W, hidden=_H)
    rows, down = 2 * random(_E * 2 * _W, _H), random(_E * _W, _H)
    values = {"gate_up_proj": small.gate_up_family(rows), "down_proj": small.down_family(down)}
    values |= {name: random(_E, size) for name, size in zip(_BIASES, (2 * _W, _H)) if name in names}
    stand_in = copy.copy(module)
    sizes = {name: size for name, size in (_COUNTS | _SIZES).items() if isinstance(getattr(module, name, None), int)}
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    stand_in.__dict__ = {**module.__dict__, **sizes, "_parameters": parameters}
    x, weights = random(5, _H), random(5, 2)
    chosen = torch.stack([torch.randperm(_E, generator=generator)[:2] for _ in range(5)])
    combine = combined(module, experts.activation, experts.interleaved)
    try:
        gate, up = random(5, _W), 8 * random(5, _W)
        if experts.activation and hasattr(module, "_apply_gate"):  # A clamp is seen where values are large.
            far = torch.tensor([[1.0], [-1.0], [1e3], [-1e3], [30.0]], dtype=torch.float64)
            own, sides = combined(module, None, experts.interleaved), (gate * far, up * far.flip(0))
            if not torch.allclose(combine(*sides), own(*sides)):
                return False
        if not torch.allclose(combine(gate, up)[:, 1::2], combine(gate[:, 1::2], up[:, 1::2])):
            return False
        family = type(module).forward
        got = getattr(family, "__wrapped__", family)(stand_in, x, chosen, weights)
    except Exception:
        return False
    expected = torch.zeros_like(x)
    no_bias = [torch.zeros(_E, size, dtype=x.dtype) for size in (2 * _W, _H)]
    biases = [values.get(name, none) for name, none in zip(_BIASES, no_bias)]
    first = small.first_last(biases[0])
    for token, slot in ((token, slot) for token in range(5) for slot in range(2)):
        e = int(chosen[token, slot])
        both = functional.linear(x[token : token + 1], rows.view(_E, -1, _H)[e], first[e])
        y = combine(*both.chunk(2, -1)) @ down.view(_E, _W, _H)[e] + biases[1][e]
        expected[token] += weights[token, slot] * y[0]
    # Some families add up in fp32.
    return isinstance(got, Tensor) and got.shape == x.shape and torch.allclose(got.double(), expected, 1e-4, 1e-4)
