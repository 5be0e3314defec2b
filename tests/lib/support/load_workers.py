"""What the ranks of ``tests/quantized/test_loading.py`` run: base models in odd forms streamed into an engine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sparselora_dist.config import EngineSection, QuantizationSection, RunConfig
from sparselora_dist.engines import Engine
from sparselora_dist.io import memory
from sparselora_dist.io.adapter import is_adapted, save_adapter
from sparselora_dist.io.load import load_base
from sparselora_dist.io.manifest import CorruptFileError
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.sharding.parameters import is_zero3

from .engine_parts import close, make_engine, train_step
from .models import batch
from .nf4_workers import gathered, nf4_config, stream

COPIED = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}


def run(name: str, folders: dict[str, str], out: str) -> dict[str, Any]:
    """All cases of one engine."""
    seen: dict[str, Any] = {}
    for key in ("prequantized", "prequantized single"):
        engine, model = stream(nf4_config(name, folders[key], double_quant=key == "prequantized"))
        seen[key] = gathered(model)
        close(engine)
    for key in ("plain", "tied"):
        seen[key] = copied(name, folders[key], Path(out, f"{name}-{key}"))
    if name != "single":
        seen["offload"] = offloaded(name, folders["plain"])
    else:
        engine, _ = stream(nf4_config(name, folders["plain"]))
        seen["offload"] = {"steps": [train_step(engine, batch(4, 24, seed=0)) for _ in range(2)]}
    # Last: DeepSpeed numbers its parameters, and a rank that failed has made fewer of them.
    seen["errors"] = errors(name, folders)
    return seen


def copied(name: str, folder: str, out: Path) -> dict[str, Any]:
    """PEFT copies the LM head and adapts the embedding; a step is trained, and the adapter saved."""
    config, lora = nf4_config(name, folder), LoraConfig(**COPIED, task_type="CAUSAL_LM")
    engine = make_engine(config)
    base = load_base(
        config.model, config.quantization, engine.placement(), whole=lambda module: is_adapted(lora, module)
    )
    torch.manual_seed(7)
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=name != "zero3").train()
    engine.prepare(model)
    steps = [train_step(engine, batch(4, 24, seed=seed)) for seed in range(2)]
    parameters = engine.full_parameters()
    if engine.is_main:
        save_adapter(model, parameters, out)
    engine.barrier()
    close(engine)
    return {"steps": steps, "parameters": parameters}


def offloaded(name: str, folder: str) -> dict[str, Any]:
    """Frozen weights that live on the host."""
    config = nf4_config(name, folder)
    section: dict[str, Any]
    if name == "zero3":
        section = {"name": name, "deepspeed": config.engine.deepspeed_config()}
        section["deepspeed"]["zero_optimization"]["offload_param"] = {"device": "cpu"}
    else:
        section = {"name": name, "fsdp": {"fsdp_version": 2, "fsdp_offload_params": True}}
    config = replace(config, engine=EngineSection.from_dict(section))
    engine = make_engine(config)
    home = engine.placement().home
    engine, model = stream(config)
    steps = [train_step(engine, batch(4, 24, seed=0)) for _ in range(2)]
    where = {(p.ds_tensor if is_zero3(p) else p.to_local()).device.type for p in model.parameters()}
    close(engine)
    return {"steps": steps, "home": home, "where": where}


# --- one rank fails ---------------------------------------------------------------------------------------------------


def errors(name: str, folders: dict[str, str]) -> dict[str, str]:
    """What this rank says when the last rank finds something wrong."""
    last = dist.get_rank() == dist.get_world_size() - 1
    four_bit = nf4_config(name, folders["plain"])
    single = nf4_config(name, folders["plain"], double_quant=False)
    plain = replace(four_bit, quantization=QuantizationSection())

    def failing(tensor: str) -> Any:
        method = "read_columns" if tensor.endswith("o_proj.weight") else "read"
        original = getattr(TensorFiles, method)

        def read(self: TensorFiles, key: str, *part: Any, **named: Any) -> Tensor:
            if last and key == tensor:
                raise CorruptFileError(f"cannot read {key!r}")
            return original(self, key, *part, **named)

        return mock.patch.object(TensorFiles, method, read)

    def missing(folder: Path) -> Any:
        if last:
            raise FileNotFoundError(f"no such file: {folder}/gone")
        return find(folder)

    find = TensorFiles.of_model
    o, norm = "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"
    full = mock.patch.object(memory, "free_bytes", lambda *_: 0 if last else 10**12)
    gone = mock.patch.object(TensorFiles, "of_model", missing)
    skipped = nf4_config(name, folders["prequantized"])
    return {
        "nan": failure(nf4_config(name, folders["nan"])),
        "nan single": failure(nf4_config(name, folders["nan"], double_quant=False)),
        "read": failure(four_bit, failing(o)),
        "read single": failure(single, failing(o)),
        "read plain": failure(plain, failing(o)),
        "read norm": failure(four_bit, failing(norm)),
        # Rows that are kept as they are need no exchange, those after them do.
        "read prequantized": failure(skipped, failing("model.layers.1.self_attn.q_proj.weight.absmax")),
        "memory": failure(four_bit, full),
        "file": failure(four_bit, gone),
    }


def failure(config: RunConfig, patch: Any = None) -> str:
    engine: Engine = make_engine(config)
    placement = engine.placement()
    try:
        with patch or nullcontext():
            load_base(config.model, config.quantization, placement)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"
