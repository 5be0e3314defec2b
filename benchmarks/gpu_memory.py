"""How much memory does a 70B-shaped NF4 model take on one GPU, and what does the planner say? For benchmarks/gpu.py."""

from __future__ import annotations

from typing import Any

import torch
from gpu_models import LORA, RANK, SETTINGS, build, credit, forget_parts, make_sparse
from gpu_sides import Side, make_batch
from gpu_timing import free, timed
from shapes import SHAPES, stack

from sparselora_dist import remove_sparselora
from sparselora_dist.config import RunConfig
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.plan.hardware import GPUS, Cluster
from sparselora_dist.plan.layouts import Layout, make_plan
from sparselora_dist.plan.shapes import ModelShape
from sparselora_dist.plan.storage import resident_bytes
from sparselora_dist.plan.work import Batch

STEPS = 3


def measure_memory(
    shape: str, layers: int, *, tokens: int, length: int, context: float, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Dense and sparse steps with activation checkpointing of one model with random NF4 blocks; a row each.

    ``held_gb`` are the model's and the optimizer's own tensors, ``peak_gb`` the most that was allocated in a step
    (``None`` on a CPU); ``planned_*`` is what ``sparselora-dist plan`` gives for the same run.
    """
    known, setting = SHAPES[shape], SETTINGS["math"]
    model = build(known, layers, "nf4", device=device, dtype=dtype, length=length)
    forget_parts()
    stacked = stack(known, layers)
    batch = make_batch(stacked.vocabulary, tokens, length, context, device)
    split = partition_tokens(batch["labels"].cpu())
    rows = []
    for kind in ("dense", "sparse"):
        sparsity = setting.layers(layers) if kind == "sparse" else {}
        credit(model) if kind == "dense" else make_sparse(model, known, setting, dtype)
        side = Side(model, device, dtype)
        side.checkpointing(True)
        free()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        fits, seconds = True, None
        try:
            seconds = [timed(lambda side=side: side.step(batch), device) for _ in range(STEPS)]
        except torch.OutOfMemoryError:
            fits = False
        planned, resident = _planned(
            stacked,
            sparsity,
            Batch(tokens=tokens, context=split.context.numel() / split.tokens, length=min(length, tokens)),
            dtype,
        )
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        rows.append(
            {
                "what": f"{shape} {layers} layers nf4 {kind}",
                "tokens": tokens,
                "fits": fits,
                "step_s": min(seconds) if seconds else None,
                "held_gb": side.held / 1e9,
                "planned_held_gb": resident / 1e9,
                "peak_gb": peak,
                "planned_peak_gb": planned.total / 1e9,
                "planned": {name: size / 1e9 for name, size in planned.bytes.items()},
            }
        )
        side.clear()
        remove_sparselora(model)
    return rows


def _planned(shape: ModelShape, layers: dict[str, Any], batch: Batch, dtype: torch.dtype) -> tuple[Layout, int]:
    """The planner's layout of the same run in one process, and the bytes that it says stay between steps."""
    run = RunConfig.from_dict(
        {
            "model": {"name_or_path": "random", "dtype": str(dtype).removeprefix("torch.")},
            "data": {"train": "random"},
            "train": {"output_dir": "runs", "gradient_checkpointing": True},
            "quantization": {"load_in_4bit": True},
            "lora": LORA,
            "sparse_lora": {"enabled": bool(layers), "layers": layers, "rank": RANK},
        }
    )
    plan = make_plan(shape, run, Cluster(gpu=GPUS["h100-80gb"], gpus=1, per_node=1), batch)
    assert plan.configured is not None
    return plan.configured, resident_bytes(shape, run, 1)["total"]
