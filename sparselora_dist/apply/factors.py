"""Which estimator factors a model needs, and where they come from."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ..config.sparse import SparseLoRAConfig
from ..io.factors import FactorSet, Matrix, load_or_build
from ..io.weights import WeightSource
from ..layouts import DecoderLayer, causal_lm, decoder_layers

_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def estimator_factors(
    model: nn.Module,
    active: dict[str, dict[int, float]],
    config: SparseLoRAConfig,
    weights: WeightSource,
    group: dist.ProcessGroup | None = None,
    layers: list[DecoderLayer] | None = None,
) -> FactorSet:
    """Factors of every matrix that the ``active`` groups and layers are scored with; see :func:`load_or_build`.

    ``layers`` are those of the model, where they have been looked for.
    """
    layers = decoder_layers(model) if layers is None else layers
    matrices: list[Matrix] = sorted(
        (layer, name) for what, by_layer in active.items() for layer in by_layer for name in layers[layer].scored(what)
    )
    base_config: Any = causal_lm(model).config
    return load_or_build(
        weights,
        matrices,
        rank=config.rank,
        model_id=getattr(base_config, "_name_or_path", "") or base_config.model_type,
        model_config={key: getattr(base_config.get_text_config(), key, None) for key in _ARCHITECTURE_KEYS},
        path=config.factors,
        group=group,
    )
