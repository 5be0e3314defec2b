"""Merging, unloading and saving a whole sparse model: what PEFT and Transformers give is the family's own model.

``merge_and_unload`` and ``unload`` put the family's modules back first; ``merge_adapter`` merges where the weights are; the
state dict of the causal LM, and so ``save_pretrained`` and PEFT's base state dict, has the family's names, and such a dict
can be loaded. What cannot be done (4-bit or sharded weights) is refused before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..codecs import PlainCodec
from ..codecs.linear import FrozenLinear, FrozenMatrix
from ..io.marker import tell_reader
from ..layers.estimator import AttentionEstimator, ExpertsEstimator, FFNEstimator, PlainFFNEstimator
from ..layers.experts import SparseExperts
from ..layers.lora import cannot_merge, merge_by_layout, set_base_linear
from ..layers.masked import mask_delta
from ..layouts import causal_lm, decoder_layers
from ..sharding.parameters import distribute_like, is_dtensor
from .marking import all_marked, mark_adapters
from .state import state_of

_ESTIMATORS = (FFNEstimator, PlainFFNEstimator, AttentionEstimator, ExpertsEstimator)


def _check(model: nn.Module) -> None:
    """Raises ValueError, with the remedy, where some frozen weight is not whole and plain."""
    for module in model.modules():
        if isinstance(module, FrozenMatrix) and module.obstacle:
            raise ValueError(cannot_merge(module.obstacle))


class _Override:
    """An attribute of one instance that stands before its class's method. An object, so that it is copied with its model."""

    def __init__(self, owner: Any, name: str, model: nn.Module) -> None:
        self.owner, self.name, self.model = owner, name, model
        self.own = owner.__dict__.get(name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def remove(self) -> None:
        self.owner.__dict__.pop(self.name, None)
        if self.own is not None:
            self.owner.__dict__[self.name] = self.own


class _Unload(_Override):
    """PEFT's ``merge_and_unload`` and ``unload``."""

    def __init__(self, owner: Any, model: nn.Module, remove: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(owner, "_unload_and_optionally_merge", model)
        self.remove_sparselora = remove

    def __call__(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self.owner._check_merge_allowed()
        _check(self.model)
        masked = list(state_of(self.model).masked.values())
        self.remove_sparselora(self.model)
        for lora in masked:
            mask_delta(lora)
        for layer in decoder_layers(self.model):
            for name in layer.names:
                linear = layer.matrix(name)
                if isinstance(linear, FrozenLinear):  # As the model was loaded, without ever having been sparse.
                    set_base_linear(*layer.slot(name), linear.plain())
        return super().__call__(merge, *args, **kwargs)


class _MergeAdapter(_Override):
    """PEFT's ``merge_adapter``; the model stays sparse, and computes with the merged weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check(self.model)
        for module in self.model.modules():  # Also adapters that came after apply_sparselora.
            merge_by_layout(module)
        return super().__call__(*args, **kwargs)


class _Inject(_Override):
    """PEFT's ``inject_adapter``: of an adapter that comes after apply_sparselora."""

    def __call__(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(self.owner.peft_config.get(adapter_name), "target_parameters", None) or []
        banks = [name for name, module in self.model.named_modules() if isinstance(module, SparseExperts)]
        paths = [f"{bank}.{name}" for bank in banks for name in ("gate_up_proj", "down_proj")]
        for name in asked:  # PEFT would find no such parameter, and leave it out without a word.
            if any(path.replace(".base_layer", "").endswith(f".{name}") for path in paths):
                raise ValueError(
                    f"the adapter {adapter_name!r} is on {name} (target_parameters), a matrix of experts that are sparse: "
                    "add it before apply_sparselora"
                )
        result = super().__call__(model, adapter_name, *args, **kwargs)
        mark_adapters(self.owner.peft_config, state_of(self.model).masked)
        return result


class _Card(_Override):
    """PEFT's ``create_or_update_model_card``, which it calls where it saves."""

    def __call__(self, output_dir: str) -> Any:
        result = super().__call__(output_dir)
        if modules := all_marked(self.owner.peft_config.values()):
            tell_reader(Path(output_dir) / "README.md", modules)
        return result


class _Save(_Override):
    """``save_pretrained`` of the causal LM."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # With Transformers' own add_adapter it saves the adapter alone.
        if kwargs.get("state_dict") is None and not getattr(self.owner, "_hf_peft_config_loaded", False):
            _check(self.model)
        return super().__call__(*args, **kwargs)


class _FamilyNames:
    """State dict hook of the causal LM: the family's names and layout where it is asked for its own state dict.

    Not as a part of what wraps it: engines and checkpoints address parameters by the names that they have.
    """

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        if prefix:
            return
        frozen, experts, estimators = _parts(module)
        items = list(state.items())
        state.clear()
        for key, value in items:
            parent, _, name = key.rpartition(".")
            if parent in estimators:
                continue
            if parent in frozen and name == "rows":
                key, value = f"{parent}.weight", value.t().contiguous() if frozen[parent].transposed else value
            elif parent in experts and name == "rows":
                key, value = parent, experts[parent][0](value)
            state[key] = value


class _FromFamilyNames:
    """The way back, before the causal LM loads a state dict. The estimator stays that of the weights before."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
        if prefix:
            return
        frozen, experts, estimators = _parts(module)
        for parent, (_, as_rows) in experts.items():
            if parent in state:
                state[f"{parent}.rows"] = _dealt(as_rows(state.pop(parent)), module.get_parameter(f"{parent}.rows"))
        for parent, linear in frozen.items():
            if f"{parent}.weight" in state:
                value: Tensor = state.pop(f"{parent}.weight")
                state[f"{parent}.rows"] = _dealt(value.t() if linear.transposed else value, linear.parts[0])
        for parent, estimator in estimators.items():
            for name, parameter in estimator.named_parameters(recurse=False):
                state.setdefault(f"{parent}.{name}", parameter.detach())


def _dealt(value: Tensor, own: Tensor) -> Tensor:
    """Of a whole state dict for a sharded model: its parts are dealt by the names of parameters."""
    return distribute_like(value, own) if is_dtensor(own) and not is_dtensor(value) else value


_Way = Callable[[Tensor], Tensor]


def _parts(module: nn.Module) -> tuple[dict[str, FrozenLinear], dict[str, tuple[_Way, _Way]], dict[str, nn.Module]]:
    """By name: plain frozen linears; plain matrices of experts, with the way to the family's layout and back; estimators."""
    named = dict(module.named_modules())
    plain = {n: m for n, m in named.items() if isinstance(m, FrozenLinear) and isinstance(m.codec, PlainCodec)}
    experts: dict[str, tuple[_Way, _Way]] = {}
    for name, one in named.items():
        if isinstance(one, SparseExperts) and isinstance(one.down_proj.codec, PlainCodec):
            experts[f"{name}.gate_up_proj"] = one.layout.gate_up_family, one.layout.gate_up_rows
            experts[f"{name}.down_proj"] = one.layout.down_family, one.layout.down_rows
    return plain, experts, {n: m for n, m in named.items() if isinstance(m, _ESTIMATORS)}


def merge_as_the_family(model: nn.Module, remove: Callable[[nn.Module], nn.Module]) -> list[Any]:
    """Switch it on for a sparse model; returns handles whose ``remove()`` switches it off.

    Args:
        model: what :func:`~.model.apply_sparselora` was given.
        remove: :func:`~.model.remove_sparselora`, without its warning.
    """
    lm: Any = causal_lm(model)
    handles: list[Any] = [
        lm.register_state_dict_post_hook(_FamilyNames()),
        lm.register_load_state_dict_pre_hook(_FromFamilyNames()),
        _Save(lm, "save_pretrained", model),
    ]
    tuner = getattr(model, "base_model", None)
    if lm is not model and hasattr(type(tuner), "_unload_and_optionally_merge"):
        handles += [_Unload(tuner, model, remove), _MergeAdapter(tuner, "merge_adapter", model)]
        handles += [_Inject(tuner, "inject_adapter", model), _Card(model, "create_or_update_model_card", model)]
    return handles
