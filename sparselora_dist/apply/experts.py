"""Sparse experts in the place of a mixture's own, and back."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from sparselora_kernels import kept_per_expert

from ..codecs import PlainCodec
from ..codecs.linear import FrozenMatrix
from ..io.factors import FactorSet
from ..layers.context import SparseContext
from ..layers.estimator import ExpertsEstimator
from ..layers.experts import BIASES, GROUP, MergingExperts, SparseExperts, ThroughWrappers
from ..layers.lora import PLAIN_ONLY, cannot_merge
from ..layouts import BY_ROWS, DecoderLayer, Experts, UnsupportedModelError, decoder_layers
from ..method.channels import EXPERTS
from ..sharding.parameters import full_tensor, is_dtensor, shard_like
from ..sync.masks import MaskSync
from .state import SparseState

_MATRICES = ("gate_up_proj", "down_proj")


def check_experts(layer: DecoderLayer) -> None:
    """Raises ValueError, naming the parameter, unless the layer's experts can be made sparse."""
    experts = layer.experts
    assert experts is not None
    where = f"layers.{layer.index}.{experts.path}"
    for name, parameter in experts.module.named_parameters():
        if is_dtensor(parameter):
            raise ValueError(f"{where}.{name} is already sharded by FSDP2: call apply_sparselora before fully_shard")
        if parameter.requires_grad:
            raise ValueError(f"{where}.{name} is trainable: sparse layers need frozen base weights (use PEFT's LoRA)")
    for wrapper in experts.wrappers:
        if type(wrapper) is not ParamWrapper:
            raise ValueError(f"{where} carries a {type(wrapper).__name__}: {PLAIN_ONLY}")
        if wrapper.parameter_name not in _MATRICES:
            raise UnsupportedModelError(
                f"{where} carries an adapter on its parameter {wrapper.parameter_name!r} (target_parameters); sparse "
                f"experts know {' and '.join(_MATRICES)}: leave it out, or keep the experts of this layer dense"
            )


def replace_experts(layer: DecoderLayer, state: SparseState, factors: FactorSet) -> None:
    """Put a :class:`SparseExperts` where the configuration has one, and where a run has loaded the matrices by rows."""
    sparsity, layout = state.sparsity.get(GROUP, {}).get(layer.index), layer.experts
    if layout is None:
        return
    family = layout.module
    by_rows = family.__dict__.get(BY_ROWS, {})
    values = {name: by_rows.get(name) or getattr(family, name) for name in _MATRICES}
    first, estimator = values["down_proj"], None
    if sparsity is None and not isinstance(first, FrozenMatrix):
        return
    matrices = {name: _freeze(value, name, layout) for name, value in values.items()}
    if sparsity is not None:
        device = (first.parts[0] if isinstance(first, FrozenMatrix) else first).device
        pairs = [factors[layer.index, name] for name in EXPERTS]
        moved = [(a, b) if device.type == "meta" else (a.to(device), b.to(device)) for a, b in pairs]
        estimator = ExpertsEstimator(*moved)
        shard_like(estimator.parameters(), matrices["down_proj"].parts[0])
    sparse = SparseExperts(
        family,
        layout,
        matrices["gate_up_proj"],
        matrices["down_proj"],
        context=state.context,
        layer=layer.index,
        estimator=estimator,
        keep=kept_per_expert(layout.width, sparsity or 0.0),
        lora_branch=state.config.lora_branch,
    )
    for name in (*_MATRICES, *BIASES):
        if name in family._parameters:
            family._parameters[name] = None
    layout.replace(sparse)
    state.experts.append(sparse)
    wrappers = layout.wrappers
    for wrapper in wrappers:
        for method in ("merge", "unmerge"):
            wrapper.__dict__[method] = MergingExperts(wrapper, method, sparse, cannot_merge)
    if wrappers:
        wrappers[0].__dict__["forward"] = ThroughWrappers(wrappers[0], sparse)
        wrappers[0].__dict__["gathers_together"] = True


def whole_experts(model: nn.Module) -> None:
    """Let the experts of a model that :func:`sparselora_dist.io.load.load_base` gave compute, all channels of all tokens.

    For who runs such a model without :func:`~.model.apply_sparselora`.
    """
    for layer in decoder_layers(model):
        layout = layer.experts
        by_rows = layout.module.__dict__.get(BY_ROWS) if layout else None
        if layout and by_rows:
            context = SparseContext(MaskSync("local", 1, None, 1.0))
            matrices = [by_rows[name] for name in _MATRICES]
            layout.replace(SparseExperts(layout.module, layout, *matrices, context=context, layer=layer.index))


def _freeze(value: Any, name: str, layout: Experts) -> FrozenMatrix:
    """A family's parameter with the neuron as dim 0 of what is stored, in the same memory where it can be."""
    if isinstance(value, FrozenMatrix):
        return value
    whole = full_tensor(value)
    rows: Tensor = layout.gate_up_rows(whole) if name == "gate_up_proj" else layout.down_rows(whole)
    stored = nn.Parameter(rows.contiguous(), requires_grad=False)
    shard_like([stored], value)
    return FrozenMatrix(PlainCodec(stored.dtype), {"rows": stored}, layout.hidden)


def restore_experts(state: SparseState) -> None:
    """Put the family's own modules back, with the adapters that are there now."""
    for sparse in state.experts:
        layout, family = sparse.layout, sparse.family
        own = {"gate_up_proj": layout.gate_up_family, "down_proj": layout.down_family}
        for name, as_family in own.items():
            matrix: FrozenMatrix = getattr(sparse, name)
            by_rows = family.__dict__.get(BY_ROWS, {})
            if name in by_rows and not isinstance(matrix.codec, PlainCodec):
                family._parameters[name] = matrix.__dict__["placeholder"]
                continue
            by_rows.pop(name, None)
            (rows,) = matrix.parts
            family._parameters[name] = nn.Parameter(as_family(full_tensor(rows)), requires_grad=False)
            shard_like([family._parameters[name]], rows)
        for name in BIASES:
            if name in family._parameters:
                family._parameters[name] = sparse._parameters[name]
        family.train(sparse.training)
        wrappers = layout.wrappers
        layout.replace(family)
        for wrapper in wrappers:
            for name in ("merge", "unmerge", "forward", "gathers_together"):
                wrapper.__dict__.pop(name, None)
