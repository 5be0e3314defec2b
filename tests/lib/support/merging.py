"""Base models, adapters and merges on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from .models import ALL_LINEAR, batch, tiny_base

# Rows of whole blocks of 64, so that bitsandbytes itself can be the reference.
BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}


def save_base(folder: Path, shard: str | None = None, **options: Any) -> Path:
    """A tiny base model's folder, in shards of at most ``shard`` ("40KB")."""
    tiny_base(**options).save_pretrained(folder, max_shard_size=shard or "1GB")
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(folder: Path, base: Path, model: Any = None, **options: Any) -> PeftModel:
    """An adapter whose every trainable tensor is random, saved to ``folder``; the PEFT model, for evaluation."""
    model = load(base) if model is None else model
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    peft = get_peft_model(model, LoraConfig(**settings | options))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.2 if "lora_A" in name else 0.05)
    peft.save_pretrained(folder)
    return peft.eval()


def logits(model: Any) -> Tensor:
    inputs = batch(rows=2, length=12, padding=False)
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits.float()


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
