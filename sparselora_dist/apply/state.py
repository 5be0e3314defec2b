"""What a model was made into: kept on it, and found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from ..config.sparse import SparseLoRAConfig
from ..config.sparse_base import SparseBaseConfig
from ..layers.context import SparseContext
from ..layers.experts import SparseExperts
from ..layers.plain_ffn import PlainFFN

STATE = "_sparselora"
"""Attribute of the model, and of the causal LM inside it, that holds the :class:`SparseState`."""


@dataclass(slots=True)
class SparseState:
    """What :func:`~.model.apply_sparselora` did to a model, and what :func:`~.model.remove_sparselora` undoes."""

    config: SparseLoRAConfig
    context: SparseContext
    sparsity: dict[str, dict[int, float]]
    """Resolved: group -> layer -> sparsity."""
    entries: list[nn.Module] = field(default_factory=list)
    """The modules that this is kept on."""
    handles: list[Any] = field(default_factory=list)
    linears: list[tuple[nn.Module, str, nn.Linear]] = field(default_factory=list)
    """(parent, name, original) of every frozen linear that was replaced."""
    mlps: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """(parent, name, original) of every FFN that was replaced."""
    plain: list[PlainFFN] = field(default_factory=list)
    """FFNs without a gate."""
    estimated: list[nn.Module] = field(default_factory=list)
    """Modules that were given an estimator as a child: attentions, and what holds an FFN without a gate."""
    experts: list[SparseExperts] = field(default_factory=list)
    """The modules of experts that were put in."""
    fused: list[nn.Module] = field(default_factory=list)
    """LoRA layers that compute base and branch together."""
    sparse_base: SparseBaseConfig | None = None
    masked: dict[str, LoraLayer] = field(default_factory=dict)
    """LoRA layers that keep the zeros of a pruned base, by the base model's names."""


def find_state(model: nn.Module) -> SparseState | None:
    """The state that :func:`~.model.apply_sparselora` left on the model or on what it wraps, if any."""
    for module in model.modules():
        if STATE in module.__dict__:
            return module.__dict__[STATE]
    return None


def state_of(model: nn.Module) -> SparseState:
    """The same, where there must be one.

    Raises:
        ValueError: the model is not sparse.
    """
    state = find_state(model)
    if state is None:
        raise ValueError("this model is not sparse: call apply_sparselora(model, config) first")
    return state
