"""What the ranks of ``tests/quantized`` run: a tiny NF4 model streamed into an engine, its bytes, and its training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.codecs import NF4Codec
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.config import EngineSection, QuantizationSection, RunConfig
from sparselora_dist.io.load import load_base
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layouts import decoder_layers, matrix_name
from sparselora_dist.sharding.parameters import full_tensor

from .agreement_workers import follow
from .engine_parts import SPARSE, close, make_engine, run_config, train_step
from .models import ALL_LINEAR, ATTENTION, batch
from .sharding_workers import held

# Rows of whole blocks everywhere, so that bitsandbytes' layout and ours coincide.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MATRICES = [(layer, name) for layer in range(3) for name in ALL_LINEAR]


def nf4_config(name: str, folder: str, dtype: str = "float32", double_quant: bool = True) -> RunConfig:
    quantization = QuantizationSection(load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)
    return replace(run_config(name, dtype, folder), quantization=quantization)


def adapted(base: Any, engine: str, targets: list[str] | None = None) -> Any:
    """The PEFT model, with the same adapter values everywhere."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets or ATTENTION, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=engine != "zero3").train()
    torch.manual_seed(7)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape) * (0.05 if "lora_B" in name else 0.1))
    return model


def frozen_linears(model: Any) -> dict[str, FrozenLinear]:
    return {
        matrix_name(layer.index, name): layer.matrix(name) for layer in decoder_layers(model) for name in ALL_LINEAR
    }


def gathered(model: Any) -> dict[str, Tensor]:
    """Whole parts of every matrix. A collective."""
    return {
        f"{matrix}.{name}": full_tensor(part).cpu().clone()
        for matrix, linear in frozen_linears(model).items()
        for name, part in zip(linear.part_names, linear.parts)
    }


def stream(config: RunConfig, sparse: bool = True, targets: list[str] | None = None) -> tuple[Any, Any]:
    """Engine and model, as a run makes them."""
    engine = make_engine(config)
    base = load_base(config.model, config.quantization, engine.placement())
    model = adapted(base.model, config.engine.name, targets)
    settings = SPARSE if sparse else {"enabled": False}
    apply_sparselora(model, SparseLoRAConfig.from_dict(settings), weights=base.weights)
    engine.prepare(model)
    return engine, model


def run(name: str, folder: str) -> dict[str, Any]:
    """Storage and training of one engine."""
    seen: dict[str, Any] = {}
    engine, model = stream(nf4_config(name, folder))
    seen["start"], seen["held"] = gathered(model), held(model)
    seen["sparse"] = follow(engine, model)
    seen["after"] = gathered(model)
    close(engine)

    engine, model = stream(nf4_config(name, folder, double_quant=False), targets=ALL_LINEAR)
    seen["single"] = gathered(model)
    seen["all linear"] = [train_step(engine, batch(4, 24, seed=0)) for _ in range(2)]
    close(engine)

    engine, model = stream(nf4_config(name, folder, "bfloat16"))
    train_step(engine, batch(4, 24, seed=0))
    seen["bf16"] = gathered(model)
    seen["random"] = _random_bytes(name, folder)
    close(engine)
    if name == "single":
        seen["dequantised"], seen["weights"] = _dequantised(folder)
    if name != "single" and dist.get_world_size() == 2:
        seen["from sharded"] = _factors_of_shards(name, folder)
    return seen


def _random_bytes(name: str, folder: str) -> list[tuple[bool, int, int]]:
    """Every byte value, through a bf16 engine's sharding and gathering: equal?, local bytes, all bytes."""
    config = nf4_config(name, folder, "bfloat16")
    engine = make_engine(config)
    placement = engine.placement()
    base = load_base(config.model, config.quantization, placement)
    model = adapted(base.model, name)
    originals = {}
    for matrix, linear in frozen_linears(model).items():
        generator = torch.Generator().manual_seed(len(matrix))
        for part in linear.part_names:
            width = linear.codec.parts(linear.row_length)[part].width
            shape = torch.Size((linear.out_features if not linear.transposed else linear.in_features, width))
            whole = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            widths = [p.width for p in linear.codec.parts(linear.row_length).values()]
            start, stop = placement.rows(shape[0], widths)
            setattr(linear, part, placement.parameter(whole[start:stop].clone(), start, shape))
            originals[f"{matrix}.{part}"] = whole
    engine.prepare(model)
    got = gathered(model)
    local = {key: p["local"] for key, p in held(model).items() if key.endswith(("codes", "scales"))}
    close(engine)
    assert set().union(*(set(w.unique().tolist()) for w in originals.values())) == set(range(256))
    return [
        (
            all(torch.equal(got[k], originals[k]) for k in originals),
            sum(local.values()),
            sum(w.numel() for w in originals.values()),
        )
    ]


def _dequantised(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same run on a plain model whose matrices are the dequantised ones."""
    from transformers import AutoModelForCausalLM

    config = run_config("single", folder=folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    codec, weights = NF4Codec(), {}
    for layer in decoder_layers(base):
        for name in ALL_LINEAR:
            weight = layer.matrix(name).weight
            turned = name in ("o_proj", "down_proj")
            value = codec.roundtrip(weight.data.t().contiguous() if turned else weight.data)
            weight.data = value.t().contiguous() if turned else value
            weights[matrix_name(layer.index, name)] = weight.data.clone()
    engine = make_engine(config)
    model = adapted(base, "single")
    apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE))
    engine.prepare(model)
    seen = follow(engine, model)
    close(engine)
    return seen, weights


def _factors_of_shards(name: str, folder: str) -> dict[str, Tensor] | None:
    """Matrices read back from the sharded model, for factors built without the files (ZeRO-3)."""
    if name != "zero3":
        return None
    config = nf4_config(name, folder)
    engine = make_engine(config)
    model = load_base(config.model, config.quantization, engine.placement()).model
    weights = ModelWeights(model)
    return {matrix_name(*matrix): weights.get(*matrix) for matrix in MATRICES}


def layouts(folder: str, names: list[str]) -> dict[str, Any]:
    """Four ranks as two nodes of two: sharded inside a node, and replicated everywhere; those that are named."""
    seen: dict[str, Any] = {}
    for layout, settings in {
        "hsdp": {"name": "fsdp2", "fsdp": {"fsdp_version": 2, "dp_shard_size": 2}},
        "replicated": {"name": "fsdp2", "fsdp": {"fsdp_version": 2, "dp_replicate_size": 4}},
        "hpz": {"name": "zero3", "deepspeed": _with_hpz(2)},
    }.items():
        if layout not in names:
            continue
        config = replace(nf4_config(settings["name"], folder), engine=EngineSection.from_dict(settings))
        engine, model = stream(config)
        seen[layout] = {"held": held(model), "run": follow(engine, model), "parts": gathered(model)}
        if layout == "hpz":
            seen[layout]["secondary"] = {
                name: p.ds_secondary_tensor.numel()
                for name, p in model.named_parameters()
                if p.ds_secondary_tensor is not None and not p.requires_grad
            }
        close(engine)
    return seen


def _with_hpz(size: int) -> dict[str, Any]:
    settings = run_config("zero3").engine.deepspeed_config()
    settings["zero_optimization"]["zero_hpz_partition_size"] = size
    return settings
