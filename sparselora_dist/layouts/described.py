"""A model of any family as the arithmetic needs it: built without weights from its config, adapters included."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..config import ConfigError
from .layers import check_causal, check_known, check_text, decoder_layers
from .names import causal_lm


def described(data: dict[str, Any], source: str) -> Any:
    """The model on the meta device, from the object in a ``config.json``.

    Raises:
        ConfigError: Transformers makes no causal language model of it.
        UnsupportedModelError: no layer of it has anything that can be sparse.
    """
    return _described(json.dumps(data, sort_keys=True, default=str), source)


@lru_cache(maxsize=4)
def _described(text: str, source: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    data = json.loads(text)
    data.pop("quantization_config", None)
    kind = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"{source}: 'model_type' is {kind!r}: allowed: types that the installed Transformers knows")
    config = CONFIG_MAPPING[kind].from_dict(data)
    check_text(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{source}: Transformers makes no causal language model of it: {error}") from error
    check_known(model, decoder_layers(model))
    check_causal(model)
    return model.requires_grad_(False)


def adapted(data: dict[str, Any], lora: Any) -> Any:
    """The same with the adapters of a run's ``lora`` section, as PEFT places them.

    Raises:
        ConfigError: they match nothing.
    """
    return _adapted(json.dumps(data, sort_keys=True, default=str), json.dumps(lora.values, sort_keys=True))


@lru_cache(maxsize=2)
def _adapted(text: str, values: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = _described.__wrapped__(text, "the model's config")
    try:
        return get_peft_model(model, LoraConfig(**json.loads(values)), low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"'lora': {error}") from error


def rest_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is in no decoder layer, and neither the embedding nor the LM head: norms, projections."""
    lm: Any = causal_lm(model)
    ends = {id(p) for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) for p in module.parameters()}
    inside = {id(p) for layer in decoder_layers(model) for p in layer.module.parameters()}
    return [(name, p) for name, p in lm.named_parameters() if id(p) not in ends | inside]
