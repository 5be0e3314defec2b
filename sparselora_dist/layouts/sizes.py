"""How large each layer of a model is, for what a step costs: also of layers that are not alike, or known in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..method.flops import LayerSize
from .layers import DecoderLayer
from .names import is_linear, shape


def layer_sizes(layers: Sequence[DecoderLayer], config: Any) -> tuple[LayerSize, ...]:
    """Of decoder layers, sparse ones and ones with adapters included.

    Args:
        config: of the decoder: says how many experts a token meets.
    """
    return tuple(_size(layer, config) for layer in layers)


def widths(layer: DecoderLayer) -> dict[str, int]:
    """Channels by group, of which one token meets a share: of routed experts those of one."""
    return layer.channels | ({"experts": layer.experts.width} if layer.experts else {})


def _size(layer: DecoderLayer, config: Any) -> LayerSize:
    known: set[int] = {id(layer.matrix(name)) for name in layer.names}
    found: dict[str, Any] = {}
    if attention := layer.attention:
        heads, hidden = attention.heads, shape(layer.linear("o_proj"))[0]
        found["products"] = heads.heads * heads.head_dim
        found |= {"query": hidden * found["products"], "key": hidden * heads.kv_heads * heads.head_dim}
        every = sum(rows * columns for rows, columns in (shape(layer.linear(name)) for name in attention.names))
        found |= {"gate": every - 2 * (found["query"] + found["key"]), "fused": attention.fused}
    if ffn := layer.ffn:
        matrices = [shape(layer.linear(name)) for name in ffn.names]
        found |= {"ffn": sum(rows * columns for rows, columns in matrices), "width": matrices[-1][1]}
        found["inputs"] = len(ffn.parts)
    if layer.experts:
        known.add(id(layer.experts.outer))
        active = min(experts_a_token(config), layer.experts.count)
        elements = 3 * active * layer.experts.width * layer.experts.hidden
        found |= {"experts": elements, "active": active, "expert_width": layer.experts.width}
    return LayerSize(other=sum(_dense(layer.module, known, config)), **found)


def _dense(module: nn.Module, known: set[int], config: Any) -> Iterator[int]:
    """Elements that a token meets of the frozen matrices that are none of a layer's own."""
    if id(module) in known or getattr(module, "is_estimator", False):
        return
    if is_linear(module) and not hasattr(module, "lora_A"):
        rows, columns = shape(module)
        yield rows * columns
        return
    for parameter in module.parameters(recurse=False):
        if parameter.requires_grad:
            continue
        if parameter.dim() == 2:
            yield parameter.numel()
        elif parameter.dim() == 3:  # Experts.
            active = min(experts_a_token(config), parameter.shape[0])
            yield parameter.numel() * active // parameter.shape[0]
    for name, child in module.named_children():
        if not name.startswith("lora_"):
            yield from _dense(child, known, config)


def experts_a_token(config: Any) -> int:
    """How many of a layer's experts a token meets."""
    for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max(value)
        if isinstance(value, int):
            return value
    return 1
