"""Sparse modules in the place of a decoder layer's own, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparselora_kernels import kept_count

from ..codecs.linear import FrozenLinear
from ..io.factors import FactorSet
from ..layers.estimator import AttentionEstimator, FFNEstimator, PlainFFNEstimator
from ..layers.ffn import SparseFFN
from ..layers.joined import JoinedLoRA
from ..layers.linear import AttentionChannels, Role, SparseProjection
from ..layers.lora import fuse_lora, merge_by_layout, set_base_linear, unfuse_lora
from ..layers.masked import unmask_lora
from ..layers.plain_ffn import PlainFFN
from ..layouts import BY_ROWS, FFN, DecoderLayer, UnsupportedModelError, base_linear, computes_linear
from ..method.channels import ATTENTION, SCORED, TRANSPOSED
from ..sharding.parameters import full_tensor, is_dtensor, shard_like
from .experts import check_experts, restore_experts
from .state import SparseState
from .tuners import check_lora

_ESTIMATOR = "sparse_estimator"


def check_frozen(layer: DecoderLayer, active: dict[str, dict[int, float]]) -> None:
    """Raises ValueError, naming the matrix, unless the layer can be made sparse."""
    names: list[str] = []
    if layer.index in active.get("ffn", {}) and layer.ffn:
        names += layer.ffn.names
    if any(layer.index in active.get(group, {}) for group in ("qk", "vo")) and layer.attention:
        names += layer.attention.names
    if layer.experts and (layer.index in active.get("experts", {}) or BY_ROWS in layer.experts.module.__dict__):
        check_experts(layer)
    for name in names:
        linear, parent = layer.matrix(name), layer.linear(name)
        where = f"layers.{layer.index}.{name}"
        check_lora(where, parent)
        if type(linear) is not nn.Linear and not isinstance(linear, FrozenLinear) and not computes_linear(linear):
            raise UnsupportedModelError(f"{where} is a {type(linear).__name__}, expected torch.nn.Linear")
        if is_dtensor(_first_part(linear)):
            raise ValueError(
                f"{where} is already sharded by FSDP2: call apply_sparselora before fully_shard, so that the factors "
                "and the transposed weights are sharded with the rest"
            )
        if any(p.requires_grad for p in linear.parameters()):
            raise ValueError(f"{where} is trainable: sparse layers need frozen base weights (use PEFT's LoRA)")


def _on_device(factors: FactorSet, layer: DecoderLayer, name: str) -> tuple[Tensor, Tensor]:
    device = _first_part(layer.matrix(layer.within(name)[0])).device
    a, b = factors[layer.index, name]
    return (a, b) if device.type == "meta" else (a.to(device), b.to(device))


def _first_part(linear: nn.Linear) -> Tensor:
    return linear.parts[0] if isinstance(linear, FrozenLinear) else linear.weight


def _freeze(linear: nn.Linear, *, transposed: bool) -> FrozenLinear:
    """The linear with the channel as dim 0 of what is stored; a plain linear gives up its weight."""
    if isinstance(linear, FrozenLinear):
        return linear
    stored = linear.weight
    if transposed:
        stored = nn.Parameter(full_tensor(linear.weight).t().contiguous(), requires_grad=False)
        shard_like([stored], linear.weight)
    linear._parameters["weight"] = None
    return FrozenLinear.adopt(linear, stored, transposed=transposed)


def replace_ffn(layer: DecoderLayer, state: SparseState, factors: FactorSet) -> None:
    """Put a :class:`SparseFFN` where the configuration has one."""
    sparsity = state.sparsity.get("ffn", {}).get(layer.index)
    if sparsity is None:
        return
    ffn = layer.ffn
    assert ffn is not None
    if ffn.kind == "plain":
        _replace_plain(layer, ffn, sparsity, state, factors)
        return
    mlp = ffn.module
    estimator = FFNEstimator(
        _on_device(factors, layer, "gate_proj"),
        _on_device(factors, layer, "up_proj"),
        ffn.activation,
    )
    shard_like(estimator.parameters(), _first_part(layer.matrix("down_proj")))
    sparse = SparseFFN(
        mlp,
        ffn.names,
        ffn.parts,
        ffn.activation,
        estimator=estimator,
        context=state.context,
        layer=layer.index,
        keep=kept_count(layer.matrix("down_proj").in_features, sparsity),
        lora_branch=state.config.lora_branch,
    )
    for name in ffn.names:
        original: nn.Linear = layer.matrix(name)
        set_base_linear(sparse, ffn.names[name], _freeze(original, transposed=name in TRANSPOSED))
        state.linears.append((sparse, ffn.names[name], original))
    state.mlps.append((ffn.parent, ffn.attribute, mlp))
    setattr(ffn.parent, ffn.attribute, sparse)


def _replace_plain(layer: DecoderLayer, ffn: FFN, sparsity: float, state: SparseState, factors: FactorSet) -> None:
    """Make up and down of an FFN without a gate sparse where they are, and register their estimator beside them."""
    estimator = PlainFFNEstimator(_on_device(factors, layer, "up_proj"), ffn.activation)
    shard_like(estimator.parameters(), _first_part(layer.matrix("down_proj")))
    ffn.module.add_module(_ESTIMATOR, estimator)
    state.estimated.append(ffn.module)
    for name, own in ffn.names.items():
        original: nn.Linear = layer.matrix(name)
        set_base_linear(ffn.module, own, _freeze(original, transposed=name in TRANSPOSED))
        state.linears.append((ffn.module, own, original))
    plain = PlainFFN(
        ffn.module,
        (ffn.names["up_proj"], ffn.names["down_proj"]),
        estimator=estimator,
        context=state.context,
        layer=layer.index,
        keep=kept_count(layer.matrix("down_proj").in_features, sparsity),
        lora_branch=state.config.lora_branch,
    )
    state.plain.append(plain)


def replace_attention(layer: DecoderLayer, state: SparseState, factors: FactorSet) -> None:
    """Put :class:`SparseProjection` where the configuration has some, and their estimator beside them."""
    sparsity = {
        group: state.sparsity[group][layer.index]
        for group in ("qk", "vo")
        if layer.index in state.sparsity.get(group, {})
    }
    if not sparsity:
        return
    attention = layer.attention
    assert attention is not None
    heads = attention.heads
    scored = [name for group in sparsity for name in SCORED[group]]
    estimator = AttentionEstimator({name: _on_device(factors, layer, name) for name in scored}, heads)
    shard_like(estimator.parameters(), _first_part(layer.matrix("o_proj")))
    attention.module.add_module(_ESTIMATOR, estimator)
    state.estimated.append(attention.module)
    counts = {"qk": heads.qk_channels, "vo": heads.vo_channels}
    keep = {group: kept_count(counts[group], s) for group, s in sparsity.items()}
    channels = AttentionChannels(state.context, layer.index, estimator, keep)
    roles: tuple[Role, ...] = ("q", "k") * ("qk" in sparsity) + ("v", "o") * ("vo" in sparsity)
    places: dict[str, dict[Role, Any]] = {}
    for role in roles:
        stored, rows = attention.parts.get(f"{role}_proj", (f"{role}_proj", None))
        places.setdefault(stored, {})[role] = rows
    for name, inside in places.items():
        original: nn.Linear = layer.matrix(name)
        frozen = _freeze(original, transposed=name in TRANSPOSED)
        own = attention.names[name]
        set_base_linear(attention.module, own, SparseProjection(frozen, places=inside, channels=channels))
        state.linears.append((attention.module, own, original))


def fuse_branches(layer: DecoderLayer, state: SparseState) -> None:
    """Compute base and LoRA branch of the layer's matrices together."""
    for part in (layer.attention, layer.ffn):
        if part is None:
            continue
        linears = [getattr(part.module, own) for own in part.names.values()]
        for linear in linears:
            merge_by_layout(linear)
        masked = set(state.masked.values())
        free = [linear for linear in linears if linear not in masked]
        fused = [linear for linear in free if fuse_lora(linear, merge=state.config.merge_lora)]
        state.fused += fused
        apart = [layer.linear(name) for name in ATTENTION[:3] if name in part.names]
        if len(apart) == 3 and all(linear in fused for linear in apart):
            JoinedLoRA(apart, state.context, layer.index)


def take_over(state: SparseState) -> None:
    """Let FFNs without a gate stand in front of their linears, once these are fused."""
    for plain in state.plain:
        plain.take_over()
        state.handles.append(plain.parent.register_forward_pre_hook(plain))


def restore(state: SparseState) -> None:
    """Put the family's own modules back, with the adapters that are there now."""
    for plain in state.plain:
        plain.release()
    for parent, name, original in state.linears:
        sparse = base_linear(getattr(parent, name))
        assert isinstance(sparse, FrozenLinear)
        if not isinstance(original, FrozenLinear):
            (stored,) = sparse.parts
            if sparse.transposed:
                stored = nn.Parameter(full_tensor(stored).t().contiguous(), requires_grad=False)
                shard_like([stored], sparse.parts[0])
            original.weight = stored
        original.train(sparse.training)
        set_base_linear(parent, name, original)
    for parent, attribute, mlp in state.mlps:
        sparse = getattr(parent, attribute)
        mlp.train(sparse.training)
        for name in sparse.family_names.values():  # An adapter may have come, or gone, meanwhile.
            setattr(mlp, name, getattr(sparse, name))
        setattr(parent, attribute, mlp)
    restore_experts(state)
    for layer in state.fused:
        unfuse_lora(layer)
    for masked in state.masked.values():
        unmask_lora(masked)
    for parent in state.estimated:
        delattr(parent, _ESTIMATOR)
