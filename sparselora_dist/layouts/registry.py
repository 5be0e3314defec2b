"""Layouts from outside: a file of yours says where the matrices of its FFN or attention are, and nothing else changes.

::

    from sparselora_dist.layouts import FFN, register_ffn

    @register_ffn
    def find(layer):
        block = getattr(layer, "mixer", None)
        if isinstance(block, MyFFN):
            return FFN.gated("mixer", layer, ("wg", "wu", "wd"), torch.nn.functional.silu)

What it returns must compute ``down(activation(gate(x)) * up(x))``, as its own forward does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .attention import Attention
from .attention import find_attention as _own_attention
from .ffn import FFN
from .ffn import find_ffn as _own_ffn

FindFFN = Callable[[nn.Module], "FFN | None"]
FindAttention = Callable[[nn.Module, Any], "Attention | None"]
_F = TypeVar("_F", bound=Callable[..., Any])
_ffns: list[FindFFN] = []
_attentions: list[FindAttention] = []


def register_ffn(finder: _F) -> _F:
    """Ask ``finder(decoder_layer)`` for the FFN of every layer, before the layouts known here; ``None``: not one of its own.

    Gives it back, to be used as a decorator. Registering it again changes nothing.
    """
    return _register(_ffns, finder)


def register_attention(finder: _F) -> _F:
    """Ask ``finder(decoder_layer, config)`` for the attention of every layer, as :func:`register_ffn`."""
    return _register(_attentions, finder)


def unregister(finder: Callable[..., Any]) -> None:
    """Ask it no longer."""
    for finders in (_ffns, _attentions):
        if finder in finders:
            finders.remove(finder)


def find_ffn(layer: nn.Module) -> FFN | str:
    """The FFN of a decoder layer, or why there is none."""
    return next((found for finder in _ffns if (found := finder(layer)) is not None), None) or _own_ffn(layer)


def find_attention(layer: nn.Module, config: Any) -> Attention | str:
    """The attention of a decoder layer, or why there is none whose channels are known."""
    found = next((found for finder in _attentions if (found := finder(layer, config)) is not None), None)
    return found or _own_attention(layer, config)


def _register(finders: list[Any], finder: _F) -> _F:
    if finder not in finders:
        finders.append(finder)
    return finder
