"""Pruned base models on disk, and adapters that say that they were trained under their zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselora_dist.io.marker import marked_config

from .merging import BLOCKS, load, make_adapter
from .models import ALL_LINEAR, tiny_base

PATTERNS = ("0.5", "2:4", "4:8")


def keep(weight: Tensor, pattern: str) -> Tensor:
    """Where a matrix stays by magnitude: a share of it, or N of every M; bool of its shape."""
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = weight.abs().reshape(-1, m)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, True)
        return kept.view(weight.shape)
    # A row at a time, and one row of zeros: its blocks have a scale of zero.
    count = int(weight.shape[1] * (1 - float(pattern)))
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept.scatter_(1, weight.abs().topk(count, 1).indices, True)
    kept[3] = False
    return kept


def save_pruned(folder: Path, pattern: str, shard: str | None = "40KB", **options: Any) -> Path:
    """A tiny base whose decoder matrices have zeros, in bf16."""
    model = tiny_base(**({"dtype": torch.bfloat16, "num_key_value_heads": 4} | BLOCKS | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.split(".")[-2] in ALL_LINEAR:
                p.mul_(keep(p.float(), pattern))
    model.save_pretrained(folder, max_shard_size=shard or "1GB")
    return folder


def mark(adapter: Path, modules: list[str]) -> None:
    """Put the mark into a saved adapter's config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(marked_config(json.loads(path.read_text()), modules)))


def make_marked(folder: Path, base: Path, model: Any = None, **options: Any) -> list[str]:
    """An adapter of random tensors whose every module is marked; the modules."""
    peft = make_adapter(folder, base, load(base) if model is None else model, **options)
    modules = [
        name.removeprefix("base_model.model.") for name, module in peft.named_modules() if hasattr(module, "lora_A")
    ]
    mark(folder, modules)
    return modules
