"""The plugin's face: make a PEFT model sparse in place, undo it, and see what it chose."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..config.ranges import AUTO
from ..config.sparse import GROUPS, SparseLoRAConfig
from ..config.sparse_base import SparseBaseConfig
from ..io.factors import FactorSet
from ..io.weights import ModelWeights, WeightSource
from ..layers.context import SparseContext
from ..layers.hooks import BeginHook, FinishHook, LayerHook, OuterBeginHook, OuterFinishHook
from ..layers.last_layer import trim
from ..layers.logits import pack_logits
from ..layouts import (
    DecoderLayer,
    UnsupportedModelError,
    base_linear,
    causal_lm,
    check_causal,
    check_known,
    decoder_layers,
)
from ..sharding.parameters import is_dtensor, is_initialized_zero3, is_zero3
from ..sharding.units import mark_unit, unmark_unit
from ..sync.masks import MaskSync
from .experts import replace_experts
from .factors import estimator_factors
from .marking import mark_adapters
from .masking import find_pruned, mask
from .merging import merge_as_the_family
from .replace import check_frozen, fuse_branches, replace_attention, replace_ffn, restore, take_over
from .state import STATE, SparseState, find_state, state_of
from .tuners import check_methods, other_methods

log = logging.getLogger(__name__)


def apply_sparselora(
    model: nn.Module,
    config: SparseLoRAConfig,
    *,
    sparse_base: SparseBaseConfig | None = None,
    weights: WeightSource | None = None,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 1800.0,
) -> nn.Module:
    """Make the frozen layers of ``model`` sparse, in place and for this instance only.

    Call it after PEFT and before FSDP2's ``fully_shard`` or ``deepspeed.initialize``; a model that was loaded under
    ``deepspeed.zero.Init`` is fine. Every rank must call it.

    Args:
        model: a PEFT model, or a causal LM, of a supported family, with its base weights frozen.
        config: what is sparse, and when.
        sparse_base: the base is pruned, and its adapters keep it so: ``Ŵ = (W + s·B·A) ⊙ (W ≠ 0)``.
        weights: where the estimator factors are built from; by default the model itself.
        process_group: the data-parallel ranks whose tokens choose the channels; by default all ranks.
        timeout: seconds that a rank waits for the others in mask synchronisation.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: unknown family or layout, or no causal language model.
        ValueError: already applied, weights on several devices, trainable base weights, another method than plain LoRA
            in a sparse module (DoRA, VeRA, ...), prompt learning or X-LoRA anywhere, a layer range that does not fit,
            factors that do not match; a ``sparse_base`` that has no zeros, or an adapter on it that cannot be masked.

    Whatever it raises, the model is as it was.
    """
    if find_state(model) is not None:
        raise ValueError("apply_sparselora was already called on this model; call remove_sparselora first")
    if is_initialized_zero3(model):
        raise ValueError("deepspeed.initialize already has this model: call apply_sparselora before it")
    layers = decoder_layers(model)
    check_causal(model)
    check_methods(model)
    _check_one_device(layers)
    sparsity: dict[str, dict[int, float]] = {}
    if config.enabled:
        try:
            check_known(model, layers)
            sparsity = _sparsity(config, layers)
        except UnsupportedModelError as error:
            raise other_methods(layers, error) from None
    active = {group: by_layer for group, by_layer in sparsity.items() if by_layer}
    for layer in layers:
        check_frozen(layer, active)
    context = SparseContext(
        MaskSync(config.mask_sync, max(_sums(layer, active) for layer in layers), process_group, timeout),
        config.start_step,
        config.end_step,
        config.interval,
    )
    context.enabled = bool(active)
    context.skip_unused_logits = config.skip_unused_logits
    context.sparse_references = config.reference == "sparse"
    masked = find_pruned(model, config, sparse_base) if sparse_base is not None and sparse_base.enabled else {}
    state = SparseState(config=config, context=context, sparsity=active, sparse_base=sparse_base, masked=masked)
    factors: FactorSet = {}
    if active:
        factors = estimator_factors(model, active, config, weights or ModelWeights(model), process_group, layers)
    try:
        _apply(model, layers, state, factors)
    except BaseException:
        _undo(model, layers, state)
        raise
    return model


def _apply(model: nn.Module, layers: list[DecoderLayer], state: SparseState, factors: FactorSet) -> None:
    """Change the model; ``state`` says at any time what has been done."""
    context, config = state.context, state.config
    sparse = {index for by_layer in state.sparsity.values() for index in by_layer}
    for layer in layers:
        replace_ffn(layer, state, factors)
        replace_attention(layer, state, factors)
        replace_experts(layer, state, factors)
    for layer in layers:
        fuse_branches(layer, state)
    if state.sparse_base is not None:
        mask(state.masked, state.sparse_base)
    take_over(state)
    for module in _units(model, layers):
        mark_unit(module)
    last = layers[-1]
    state.handles += pack_logits(causal_lm(model), context)
    trims = last.trims if config.skip_unused_logits else ()
    if trims:
        state.handles += trim(last.index, trims, context)
    for layer in layers:
        if layer.index in sparse or (layer is last and trims):
            hook = LayerHook(context, layer.index, required=layer.index in sparse)
            state.handles.append(layer.entry.register_forward_pre_hook(hook, with_kwargs=True))
    mark_adapters(getattr(model, "peft_config", {}), state.masked)
    state.handles += merge_as_the_family(model, _remove)
    # PEFT's wrapper hands on to the inner model; whichever of the two is called first opens the micro-batch.
    for entry in {id(m): m for m in (model, causal_lm(model))}.values():
        begin, finish = (OuterBeginHook, OuterFinishHook) if entry is model else (BeginHook, FinishHook)
        state.handles.append(entry.register_forward_pre_hook(begin(context), with_kwargs=True))
        state.handles.append(entry.register_forward_hook(finish(context), always_call=True))
        setattr(entry, STATE, state)
        state.entries.append(entry)


def _sparsity(config: SparseLoRAConfig, layers: list[DecoderLayer]) -> dict[str, dict[int, float]]:
    """What ``config`` says of these layers.

    Raises:
        UnsupportedModelError: it names a layer that has no such group.
    """
    able = {group: [layer.index for layer in layers if group not in layer.missing] for group in GROUPS}
    sparsity = config.sparsity(len(layers), able)
    for group in GROUPS:
        left = [layer for layer in layers if group in layer.missing]
        if left and AUTO in config.layers.get(group, {}):
            numbers = ", ".join(str(layer.index) for layer in left)
            log.info("%s stays dense in layers %s: %s", group, numbers, left[0].missing[group])
    for group, by_layer in sparsity.items():
        unable = [index for index in by_layer if group in layers[index].missing]
        if unable:
            raise UnsupportedModelError(
                f"sparse_lora.layers.{group} names layer {unable[0]}, but {layers[unable[0]].missing[group]}. "
                f"Layers that can: {', '.join(map(str, able[group])) or 'none'}"
            )
    return sparsity


def _sums(layer: DecoderLayer, active: dict[str, dict[int, float]]) -> int:
    """The most score sums that the layer sends at once."""
    experts = layer.channels["experts"] if layer.index in active.get("experts", {}) else 0
    attention = 4 * layer.attention.heads.qk_channels if layer.attention else 0
    return max(layer.channels.get("ffn", 0), attention, experts)


def _undo(model: nn.Module, layers: list[DecoderLayer], state: SparseState) -> None:
    restore(state)
    for handle in state.handles:
        handle.remove()
    for module in _units(model, layers):
        unmark_unit(module)
    for entry in state.entries:
        entry.__dict__.pop(STATE, None)


def _units(model: nn.Module, layers: list[DecoderLayer]) -> list[nn.Module]:
    """What an engine gathers by itself."""
    lm: Any = causal_lm(model)
    return [lm.get_input_embeddings(), *(layer.module for layer in layers), lm.get_output_embeddings()]


def _check_one_device(layers: list[DecoderLayer]) -> None:
    """Raises ValueError, naming the devices, where the decoder's frozen weights are on more than one."""
    frozen = (p for layer in layers for p in layer.module.parameters() if not p.requires_grad and not is_zero3(p))
    devices = {str(p.device) for p in frozen} - {"meta"}
    if len(devices) > 1:
        raise ValueError(
            f"the decoder's frozen weights are on several devices ({', '.join(sorted(devices))}), as with "
            'device_map="auto": load the model on one device per process, and shard it by FSDP2 or ZeRO-3 if it is too '
            "large for one"
        )


def remove_sparselora(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_sparselora` in place: outputs are bit-identical to those before it. Returns ``model``.

    Raises:
        ValueError: nothing was applied, or an engine has sharded the weights meanwhile.
    """
    if masked := state_of(model).masked:
        warnings.warn(
            f"{len(masked)} adapters were trained under the mask of a pruned base (sparse_base), and without it are "
            f"another model (first: {next(iter(masked))}): merge them before, or save them and use sparselora-dist merge",
            stacklevel=2,
        )
    return _remove(model)


def _remove(model: nn.Module) -> nn.Module:
    state = state_of(model)
    parts = [base_linear(getattr(parent, name)).parts[0] for parent, name, _ in state.linears]
    for part in [*parts, *(sparse.down_proj.parts[0] for sparse in state.experts)]:
        if is_zero3(part) or is_dtensor(part):
            raise ValueError(
                "remove_sparselora needs whole weights, but an engine has sharded them: save the adapter and load it "
                "on the plain base model instead"
            )
    _undo(model, decoder_layers(model), state)
    return model


def selection(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Kept channels of the last training forward: ``{layer: {group: (k,) sorted int64}}``; empty if it was dense.

    ``ffn``: neuron ``j``; ``qk``: ``h * (D/2) + pair``; ``vo``: ``h * D + d``; ``h`` a key/value head;
    ``experts``: ``e * W + j``, as many of every expert ``e``.
    """
    batch = state_of(model).context.last
    chosen: dict[int, dict[str, Tensor]] = {}
    for (layer, group), channels in sorted(batch.masks.items()) if batch else ():
        chosen.setdefault(layer, {})[group] = channels.clone()
    return chosen


def set_step(model: nn.Module, step: int, total_steps: int) -> None:
    """Drive the schedule from a training loop of your own: optimizer step ``step`` (from 0) of ``total_steps``."""
    state_of(model).context.set_step(step, total_steps)
