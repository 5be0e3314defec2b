"""The base model and its tokenizer from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..config.run import ModelSection
from ..families import check_family


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer; code from the checkpoint is never run."""
    return AutoTokenizer.from_pretrained(section.name_or_path)


def check_model(section: ModelSection) -> Any:
    """The model's config, refused early where the family is not supported."""
    config = AutoConfig.from_pretrained(section.name_or_path)
    check_family(config)
    return config


def load_base(section: ModelSection) -> Any:
    """The base model on the CPU (or partitioned, where the engine's loading context is active), frozen."""
    model = AutoModelForCausalLM.from_pretrained(
        section.name_or_path,
        dtype=getattr(torch, section.dtype),
        attn_implementation=section.attn_implementation,
        use_safetensors=True,
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    return model
