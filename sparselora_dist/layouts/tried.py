"""What an FFN computes, tried: the family's own ``forward`` on matrices of a few elements in the place of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

_HIDDEN, _WIDTH = 4, 6
_FLOAT = torch.float64


def computes_linear(linear: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes what that does, from its weight and bias alone."""
    numbers = torch.Generator().manual_seed(0)
    plain, x = _linear(_HIDDEN, _WIDTH, numbers), _random((1, 3, _HIDDEN), numbers)
    plain.bias = nn.Parameter(_random((_WIDTH,), numbers))
    try:
        with torch.no_grad():
            return _equal(type(linear).forward(plain, x), plain(x))
    except Exception:
        return False


def computes_gated(module: nn.Module, names: Sequence[str], activation: Callable[..., Any]) -> bool:
    """Whether it is ``down(act(gate(x)) * up(x))``, with its children ``names`` as gate, up and down."""
    if type(module).__module__.startswith("liger_kernel"):
        return True  # The same formula in kernels that a CPU cannot run.
    numbers = torch.Generator().manual_seed(0)
    gate, up, down = (_linear(a, b, numbers) for a, b in ((_HIDDEN, _WIDTH),) * 2 + ((_WIDTH, _HIDDEN),))
    x = _near_and_far(numbers)
    return _equal(_run(module, dict(zip(names, (gate, up, down))), x), down(activation(gate(x)) * up(x)))


def fused_order(module: nn.Module, names: Sequence[str], activation: Callable[..., Any]) -> tuple[str, str] | None:
    """Which half of the first of its two matrices is the gate, and which is up; ``None`` where it computes neither."""
    if type(module).__module__.startswith("liger_kernel"):
        return "gate_proj", "up_proj"
    numbers = torch.Generator().manual_seed(0)
    both, down = _linear(_HIDDEN, 2 * _WIDTH, numbers), _linear(_WIDTH, _HIDDEN, numbers)
    x = _near_and_far(numbers)
    first, second = both(x).chunk(2, -1)
    got = _run(module, dict(zip(names, (both, down))), x)
    if _equal(got, down(activation(first) * second)):
        return "gate_proj", "up_proj"
    return ("up_proj", "gate_proj") if _equal(got, down(activation(second) * first)) else None


class _Gives(nn.Module):
    """Stands where up is: gives the same whatever it is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class _Takes(nn.Module):
    """Stands where down is: remembers what it was given, and gives what the layer goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.taken.append(x)
        return torch.zeros(1, 3, _HIDDEN, dtype=_FLOAT)


class _Attention(nn.Module):
    """Stands where an attention is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros(1, 3, _HIDDEN, dtype=_FLOAT), None


def computes_plain(
    module: nn.Module, names: Sequence[str], activation: Callable[..., Any]
) -> Literal["alone", "residual"] | None:
    """Whether its two matrices are an FFN without a gate, ``act`` alone and elementwise between them.

    They must be called once each and by nothing else, and what is between them must take a tensor of any shape: up then
    gives, and down then takes, what is kept of the tokens one after another.

    Returns:
        What its ``forward`` is given: the hidden states alone, or a residual beside them; ``None`` where it is none.
    """
    numbers = torch.Generator().manual_seed(0)
    act, packed = _on_cpu(activation), _random((1, 1, 7), numbers)
    x = _random((1, 3, _HIDDEN), numbers)
    down = _Takes()
    children: dict[str, nn.Module] = dict(zip(names, (_Gives(packed), down)))
    for name, child in module.named_children():
        if child is activation:
            children.setdefault(name, act)
        elif "Norm" in type(child).__name__ or isinstance(child, nn.Dropout):
            children.setdefault(name, nn.Identity())
        elif "attn" in name or "attention" in name:
            children.setdefault(name, _Attention())
    expected = _elementwise(act, packed)
    for reads, arguments in (("alone", (x,)), ("residual", (x, torch.zeros_like(x)))):
        down.taken.clear()
        _run(module, children, *arguments)
        if len(down.taken) == 1 and _equal(down.taken[0], expected):
            return reads  # type: ignore[return-value]
    return None


class _Called(Exception):
    """A child of a layer was called, with ``given``."""

    def __init__(self, name: str, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.given = name, given


class _Tells(nn.Module):
    """Stands where a child of a layer is, and says that it was called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.zeros(1)  # Some layers cast to the dtype of their norm's.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Called(self.name, (*args, *kwargs.values()))


def first_child(layer: nn.Module) -> str | None:
    """The child that a decoder layer calls first, if it hands on the very tensor that the layer was given."""
    hidden = torch.zeros(1, 3, _HIDDEN)
    stand_in = copy.copy(layer)
    children = {
        name: nn.Identity() if isinstance(child, nn.Dropout) else _Tells(name) for name, child in layer.named_children()
    }
    stand_in.__dict__ = {**layer.__dict__, "_modules": children, "training": False}
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    try:
        type(layer).forward(stand_in, hidden, **dict.fromkeys(needed))
    except _Called as call:
        return call.name if any(value is hidden for value in call.given) else None
    except Exception:
        return None
    return None


def _elementwise(act: Callable[..., Any], x: Tensor) -> Tensor | None:
    """``act(x)``; ``None`` where an element's value depends on the others."""
    try:
        with torch.no_grad():
            whole = act(x)
            alone = torch.stack([act(value.view(1, 1, 1)).view(()) for value in x.flatten()]).view_as(x)
    except Exception:
        return None
    return whole if _equal(whole, alone) else None


def _on_cpu(activation: Any) -> Any:
    """The activation; one with parameters with others, because its own may be on no device, or on another rank."""
    if not isinstance(activation, nn.Module) or not any(True for _ in activation.parameters()):
        return activation

    def some(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        # ZeRO-3 keeps the shape of what it has partitioned beside it.
        sizes = {name: tuple(getattr(t, "ds_shape", t.shape)) for name, t in tensors.items() if t is not None}
        return {name: torch.full(size, 0.4, dtype=_FLOAT) for name, size in sizes.items()}

    own = copy.copy(activation)
    parts = {kind: some(getattr(activation, kind)) for kind in ("_parameters", "_buffers")}
    own.__dict__ = {**activation.__dict__, **parts}
    return own


def _linear(inputs: int, outputs: int, numbers: torch.Generator) -> nn.Linear:
    # Not initialised: that would draw from the caller's random numbers.
    linear: nn.Linear = skip_init(nn.Linear, inputs, outputs, bias=False, dtype=_FLOAT)
    linear.weight.data.copy_(_random(linear.weight.shape, numbers))
    return linear


def _near_and_far(numbers: torch.Generator) -> Tensor:
    """Tokens, one of them so large that what clamps shows it."""
    x = _random((1, 3, _HIDDEN), numbers)
    x[:, -1] *= 1e3
    return x


def _random(size: Sequence[int], numbers: torch.Generator) -> Tensor:
    return torch.randn(tuple(size), generator=numbers, dtype=_FLOAT)


@torch.no_grad()
def _run(module: nn.Module, children: Mapping[str, nn.Module], *arguments: Tensor) -> Any:
    """The family's ``forward`` with other children; ``None`` where it fails."""
    stand_in = copy.copy(module)
    stand_in.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children}}
    # What is dropped between or behind the two matrices is the family's where its forward goes on running; else a dropout
    # must be seen.
    stand_in.__dict__["training"] = not any(isinstance(child, _Takes) for child in children.values())
    with torch.random.fork_rng(devices=[]):
        try:
            return type(module).forward(stand_in, *arguments)
        except Exception:
            return None


@torch.no_grad()
def _equal(got: Any, expected: Any) -> bool:
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        return False
    return got.shape == expected.shape and torch.allclose(got, expected)
