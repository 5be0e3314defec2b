"""Tiny models of every supported family, with adapters that are not zero, and batches with every kind of token."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

os.environ.setdefault("SPARSELORA_CACHE", tempfile.mkdtemp(prefix="sparselora-test-cache-"))

FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases on q, k, v
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # RMS norm on q and k
}
LAYOUTS: dict[str, tuple[type, type]] = {
    "phi3": (Phi3Config, Phi3ForCausalLM),  # q, k and v in one matrix; gate and up in one
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),  # q, k and v in one, head by head; no gate; biases
}
FUSED = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
}
"""All their matrices."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """6 query heads on 2 key/value heads, an FFN width that is no power of two."""
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    return {**FAMILIES, **LAYOUTS}[family][0](**(shape | overrides))


def tiny_base(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A base model with random weights, biases and norms that are not their defaults."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **LAYOUTS}[family][1](tiny_config(family, **overrides))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.2)
            elif "norm" in name:
                p.uniform_(0.7, 1.3)
            else:
                p.mul_(5)  # Initialised at std 0.02: too small for channels to differ.
    return model.to(dtype)


def tiny_lora(
    family: str = "llama", targets: list[str] | None = None, seed: int = 0, dropout: float = 0.0, **overrides: Any
) -> PeftModel:
    """A PEFT model whose LoRA B matrices are not zero, in training mode."""
    base = tiny_base(family, seed, **overrides)
    torch.manual_seed(seed + 1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets or ATTENTION, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.train()


def batch(
    rows: int = 4, length: int = 24, seed: int = 0, vocabulary: int = 96, padding: bool = True
) -> dict[str, Tensor]:
    """Prompts of different lengths, right padding on odd rows, labels on the completion."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        prompt = length // 2 + row % 5
        labels[row, :prompt] = -100
        if padding and row % 2:
            real = length - 1 - row % 4
            ids[row, real:], labels[row, real:], mask[row, real:] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
