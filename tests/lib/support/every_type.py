"""A tiny model of every causal model type that the installed Transformers has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
# Whatever of these a config has is set. Four layers, so that hybrids have one of each kind.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "d_model": 64, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 112, "n_positions": 128, "num_layers": 4,
    "num_heads": 4, "ffn_dim": 112, "decoder_layers": 4, "encoder_layers": 1, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 112, "encoder_ffn_dim": 112, "word_embed_proj_dim": 64,
    # Mixtures of experts.
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "decoder_sparse_step": 1, "shared_intermediate_size": 32, "moe_num_experts": 4,
    "expert_ffn_hidden_size": 32, "ffn_hidden_size": 112, "moe_topk": 2, "moe_k": 2, "num_dense_layers": 1,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    # Linear attention and state spaces.
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_d_ssm": 128, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
    # Gemma.
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
    "query_pre_attn_scalar": 16, "num_kv_shared_layers": 0, "num_global_key_value_heads": 2, "sliding_window": 16,
    "partial_rotary_factor": 0.5, "layers_block_type": None,
}  # fmt: skip
_LARGEST = 3_000_000
# Not through their default.
_OWN: dict[str, dict[str, Any]] = {}


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> Any:
    """Raises whatever the type raises where it cannot be made so small; ValueError where it comes out large."""
    kind = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    options = {name: value for name, value in _SMALL.items() if name in known and value is not None}
    if "partial_rotary_factor" in options and getattr(kind, "partial_rotary_factor", 1.0) in (None, 1.0):
        del options["partial_rotary_factor"]
    config = kind(**(options | _OWN.get(model_type, {})))
    with torch.device("meta"):
        elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if elements > _LARGEST:
        raise ValueError(f"{elements:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(3)  # So that channels differ.
    return model.float()


def rows(rows: int = 3, length: int = 18) -> dict[str, torch.Tensor]:
    """Prompts of different lengths with an answer, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : length // 2 + row] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
