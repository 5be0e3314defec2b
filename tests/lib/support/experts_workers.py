"""A small mixture of experts, streamed from its files into an engine and trained: whole and as NF4."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.config import QuantizationSection, RunConfig
from sparselora_dist.config.lora import LoraSection
from sparselora_dist.io.load import load_base

from .agreement_workers import follow
from .engine_parts import close, make_engine, run_config
from .models import ALL_LINEAR
from .nf4_workers import adapted
from .plan_workers import resident
from .sharding_workers import held
from .small_floats import encode_files

STORAGES = ("float32", "nf4", "fp8")
"""The last is read as it is from files that hold it, experts and all, in blocks of 32 by 32."""
FP8 = "fine-grained powers"
GROUPS = {0: {"ffn", "vo"}, 1: {"experts", "vo"}, 2: {"experts", "qk"}}
LAYERS = {"ffn": {"0": 0.75}, "qk": {"2": 0.5}, "vo": {"0-1": 0.5}, "experts": {"1-2": 0.5}}
EXPERTS, WIDTH, HIDDEN = 6, 64, 64


def moe_config() -> Qwen3MoeConfig:
    """The first layer has an FFN, two have experts; rows of whole NF4 blocks."""
    return Qwen3MoeConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=128, moe_intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=2,
        mlp_only_layers=[0], max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def moe_base() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(moe_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)
    return model


def run(name: str, storage: str, folder: str = "tiny") -> RunConfig:
    config = run_config(name, folder=folder)
    return replace(
        config,
        quantization=QuantizationSection(format=None if storage == "float32" else storage),  # type: ignore[arg-type]
        lora=LoraSection(values={"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR}),
        sparse_lora=SparseLoRAConfig.from_dict({"layers": LAYERS, "rank": 4}),
    )


@cache
def _folder(encoded: bool) -> str:
    """Of the saved model, the same on all ranks: its files hold the experts one by one."""
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    if not dist.is_initialized() or dist.get_rank() == 0:
        moe_base().save_pretrained(folder[0])
        if encoded:
            encode_files(Path(folder[0]), FP8)
    if dist.is_initialized():
        dist.barrier()
    return folder[0]


def experts(name: str) -> dict[str, Any]:
    seen = {}
    for storage in STORAGES:
        config = run(name, storage, _folder(storage == "fp8"))
        engine = make_engine(config)
        base = load_base(config.model, config.quantization, engine.placement())
        model = adapted(base.model, name, ALL_LINEAR)
        apply_sparselora(model, config.sparse_lora, weights=base.weights)
        engine.prepare(model)
        seen[storage] = {"run": follow(engine, model), "held": held(model), "bytes": resident(engine, model)}
        close(engine)
    return seen
