"""A small pruned model, streamed from its files into an engine, trained under its mask, and its adapter saved."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselora_dist import SparseBaseConfig, SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_dist.config import QuantizationSection
from sparselora_dist.io.adapter import save_adapter
from sparselora_dist.io.load import load_base
from sparselora_dist.pruning.pattern import Pattern, smallest
from sparselora_dist.sharding.parameters import full_tensor

from .agreement_workers import follow
from .engine_parts import SPARSE, close, make_engine, run_config
from .models import ALL_LINEAR, batch, tiny_base
from .nf4_workers import SHAPE, adapted

PATTERNS = {"50 %": Pattern.share(0.5), "2:4": Pattern.parse("2:4"), "4:8": Pattern.parse("4:8")}
CASES = {
    "50 %, float32": ("50 %", "float32", "exact"),
    "50 %, float32, straight through": ("50 %", "float32", "straight_through"),
    "2:4, nf4": ("2:4", "nf4", "exact"),
    "2:4, bfloat16": ("2:4", "bfloat16", "exact"),
    "4:8, nf4": ("4:8", "nf4", "exact"),
}


def prune_decoder(model: Any, pattern: Pattern) -> None:
    """By magnitude: the matrices of the decoder layers, as ``sparselora-dist prune`` does."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers." in name and "lora" not in name:
            parameter.data[smallest(parameter.detach().abs(), pattern, "matrix")] = 0


@cache
def base_folder(pattern: str) -> str:
    """Of the saved pruned model, the same on all ranks."""
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    if not dist.is_initialized() or dist.get_rank() == 0:
        model = tiny_base(**SHAPE)
        prune_decoder(model, PATTERNS[pattern])
        model.save_pretrained(folder[0])
    if dist.is_initialized():
        dist.barrier()
    return folder[0]


def frozen_bytes(model: Any) -> str:
    """A hash of all that is stored of the frozen matrices."""
    digest = hashlib.sha256()
    for module in model.modules():
        for part in module.parts if isinstance(module, FrozenLinear) else ():
            digest.update(full_tensor(part).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pruned(name: str) -> dict[str, Any]:
    """By case: the run, where base and adapter are, and whether the frozen matrices are what they were."""
    seen = {}
    for case, (pattern, storage, gradient) in CASES.items():
        four_bit = storage == "nf4"
        config = run_config(name, "float32" if four_bit else storage, base_folder(pattern))
        config = replace(config, quantization=QuantizationSection(load_in_4bit=four_bit))
        engine = make_engine(config)
        base = load_base(config.model, config.quantization, engine.placement())
        model = adapted(base.model, name, ALL_LINEAR)
        if name == "zero3" and storage == "bfloat16":  # As a run does it: the optimizer keeps fp32 masters.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
        sparse_base = SparseBaseConfig(gradient=gradient)
        apply_sparselora(model, SparseLoRAConfig.from_dict(SPARSE), sparse_base=sparse_base, weights=base.weights)
        engine.prepare(model)
        masked = sorted(find_state(model).masked)
        before = frozen_bytes(model)
        run = follow(engine, model)
        same = frozen_bytes(model) == before
        engine.model.eval()
        with torch.no_grad(), engine.autocast():
            logits = engine.model(input_ids=batch(2, 12, seed=5)["input_ids"], use_cache=False).logits.float()
        folder = Path(base_folder(pattern)) / f"{storage} {gradient} {name}"
        parameters: dict[str, Tensor] = engine.full_parameters()
        if engine.is_main:
            save_adapter(engine.module, parameters, folder)
        close(engine)
        if dist.is_initialized():
            dist.barrier()
        seen[case] = {"run": run, "base": base_folder(pattern), "adapter": str(folder), "masked": masked, "same": same}
        seen[case]["logits"] = logits
    return seen
