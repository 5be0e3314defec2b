"""Attentions that the groups ``qk`` and ``vo`` are for: q, k, v and o are linears of whole heads, and the rest is theirs.

q, k and v may be one matrix, and that of q may have rows that are no queries (a gate): where the heads are is seen in the
family's own attention (:mod:`.heads`).

The family's own attention runs on full-width tensors, so norms on q and k, sliding windows, gates, softcaps and sinks need
nothing here. What is refused mixes channels in other ways than heads (latent attention, convolutions before it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..method.channels import ATTENTION, HeadGeometry
from .heads import find_heads
from .names import Parts, is_linear, shape
from .rotary import rotary_pairs

_ATTRIBUTES = ("self_attn", "attention", "attn", "self_attention", "mixer")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""q, k and v in one matrix; the first is what it is called here."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Where the matrices of an attention are, and what its heads are."""

    path: str
    """Its name in the decoder layer."""
    module: nn.Module
    names: dict[str, str]
    """``q_proj`` ... ``o_proj``, or ``qkv_proj`` and ``o_proj`` -> the child's own name."""
    heads: HeadGeometry
    parts: Parts
    """Where ``q_proj``, ``k_proj`` and ``v_proj`` are, of whose factors scores are made."""
    missing: dict[str, str]
    """``qk`` or ``vo`` -> why it cannot be sparse."""

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return _FUSED[0] in self.names


def find_attention(layer: nn.Module, config: Any) -> Attention | str:
    """The attention of a decoder layer, or why there is none whose channels are known."""
    path = next((name for name in _ATTRIBUTES if getattr(layer, name, None) is not None), None)
    if path is None:
        children = [f"{name} ({type(child).__name__})" for name, child in layer.named_children()]
        return f"it has no attention ({' or '.join(_ATTRIBUTES[:2])}), but {', '.join(children)}"
    module: Any = getattr(layer, path)
    what = f"its {path}, a {type(module).__name__},"
    names = _stored(module)
    if isinstance(names, str):
        return f"{what} {names}"
    strange = [
        f"{name} ({type(child).__name__})"
        for name, child in module.named_children()
        if name not in names.values() and not _is_harmless(child)
    ]
    if strange:
        return f"{what} also has {', '.join(strange)}"
    return _measured(what, path, module, names, config)


def _stored(module: Any) -> dict[str, str] | str:
    """Its matrices and their own names, q, k and v apart or in one, or which is missing."""
    output = next((name for name in _OUTPUTS if is_linear(getattr(module, name, None))), None)
    fused = next((name for name in _FUSED if is_linear(getattr(module, name, None))), None)
    apart = next((name for name in ATTENTION[:3] if not is_linear(getattr(module, name, None))), None)
    if output is None or (apart and not fused):
        return f"has no linear {apart or _OUTPUTS[0]}"
    first = {_FUSED[0]: fused} if apart and fused else {name: name for name in ATTENTION[:3]}
    return {**first, "o_proj": output}


def _is_harmless(child: nn.Module) -> bool:
    """Norms, gates and rotary angles stand before or behind whole heads; the estimator is our own."""
    kind = type(child).__name__
    known = isinstance(child, (nn.Linear, nn.Dropout, nn.Identity)) or is_linear(child)
    return known or "Norm" in kind or "Rotary" in kind or getattr(child, "is_estimator", False)


def _measured(what: str, path: str, module: Any, names: dict[str, str], config: Any) -> Attention | str:
    dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    _, o = shape(getattr(module, names["o_proj"]))
    stored = {name: own for name, own in names.items() if name != "o_proj"}
    parts: Parts = {name: (name, None) for name in ATTENTION[:3]}
    outputs = {name: shape(getattr(module, own))[0] for name, own in stored.items()}
    if _FUSED[0] in stored or outputs["q_proj"] != o:
        found = find_heads(module, stored, dim)
        if found is None and _FUSED[0] in stored:
            return f"{what} has one matrix {names[_FUSED[0]]}, and where q, k and v are in it is not known"
        parts = found or parts
    q, k, v = (outputs[name] if rows is None else len(rows) for name, rows in parts.values())  # type: ignore[arg-type]
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
    return Attention(path, module, names, HeadGeometry.of_pairs(o // dim, v // dim, dim, pairs), parts, missing)
