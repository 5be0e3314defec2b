"""Attentions that the groups ``qk`` and ``vo`` are for: q, k, v and o are linears of whole heads, and the rest is theirs.

The family's own attention runs on full-width tensors, so norms on q and k, sliding windows, gates, softcaps and sinks need
nothing here. What is refused mixes channels in other ways than heads (latent attention, convolutions before it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..method.channels import ATTENTION, HeadGeometry
from .names import Parts, is_linear, shape
from .rotary import rotary_pairs

_ATTRIBUTES = ("self_attn", "attention", "attn", "self_attention")
_OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True, slots=True)
class Attention:
    """Where the matrices of an attention are, and what its heads are."""

    path: str
    """Its name in the decoder layer."""
    module: nn.Module
    names: dict[str, str]
    """``q_proj`` ... ``o_proj`` -> the child's own name."""
    heads: HeadGeometry
    parts: Parts
    """Where ``q_proj``, ``k_proj`` and ``v_proj`` are, of whose factors scores are made."""
    missing: dict[str, str]
    """``qk`` or ``vo`` -> why it cannot be sparse."""


def find_attention(layer: nn.Module, config: Any) -> Attention | str:
    """The attention of a decoder layer, or why there is none whose channels are known."""
    path = next((name for name in _ATTRIBUTES if getattr(layer, name, None) is not None), None)
    if path is None:
        children = [f"{name} ({type(child).__name__})" for name, child in layer.named_children()]
        return f"it has no attention ({' or '.join(_ATTRIBUTES[:2])}), but {', '.join(children)}"
    module: Any = getattr(layer, path)
    what = f"its {path}, a {type(module).__name__},"
    names = {name: name for name in ATTENTION[:3]}
    names["o_proj"] = next((name for name in _OUTPUTS if hasattr(module, name)), _OUTPUTS[0])
    for own in names.values():
        if not is_linear(getattr(module, own, None)):
            return f"{what} has no linear {own}"
    strange = [
        f"{name} ({type(child).__name__})"
        for name, child in module.named_children()
        if name not in names.values() and not _is_harmless(child)
    ]
    if strange:
        return f"{what} also has {', '.join(strange)}"
    return _measured(what, path, module, names, config)


def _is_harmless(child: nn.Module) -> bool:
    """Norms, gates and rotary angles stand before or behind whole heads; the estimator is our own."""
    kind = type(child).__name__
    known = isinstance(child, (nn.Linear, nn.Dropout, nn.Identity)) or is_linear(child)
    return known or "Norm" in kind or "Rotary" in kind or getattr(child, "is_estimator", False)


def _measured(what: str, path: str, module: Any, names: dict[str, str], config: Any) -> Attention | str:
    (q, _), (k, _), (v, _), (_, o) = (shape(getattr(module, own)) for own in names.values())
    dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    if v % dim or o % dim or (o // dim) % (v // dim) or dim % 2:
        return f"{what} has matrices of {q}, {k}, {v} (out) and {o} (in), which are no heads of {dim}"
    missing = {}
    pairs: Any = None
    if q != o or k != v:
        missing["qk"] = f"{what} has q_proj of {q} and k_proj of {k} outputs, where its heads have {o} and {v}"
    else:
        pairs = rotary_pairs(module, config, dim)
        if isinstance(pairs, str):
            missing["qk"] = f"{what} cannot be told which channels belong together: {pairs}"
            pairs = None
    parts: Parts = {name: (name, None) for name in ATTENTION[:3]}
    return Attention(path, module, names, HeadGeometry.of_pairs(o // dim, v // dim, dim, pairs), parts, missing)
