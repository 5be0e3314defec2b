"""LoSA and what it is made of, on the ranks that there are."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_dist.config.run import RunConfig
from sparselora_dist.pruning.losa import LoSA, losa
from sparselora_dist.pruning.pattern import Pattern
from sparselora_dist.pruning.prune import Pruning, prune
from sparselora_dist.pruning.similarity import layer_similarity
from sparselora_dist.train import run

SEQUENCES, LENGTH, SHARES = 10, 24, (0.3, 0.4, 0.5)


def parts(folder: str, model: str, data: str, adapter: str, methods: tuple[str, ...]) -> list[Tensor]:
    """The Gram matrices; the model with an adapter on it is pruned into ``folder``, compared with itself alone."""
    for method in methods:
        prune(adapted(method, Path(folder), model, data, adapter))
    found = layer_similarity(model, Path(adapter), data, SEQUENCES, LENGTH, torch.device("cpu"))
    return found.grams


def adapted(method: str, folder: Path, model: str, data: str, adapter: str | None) -> Pruning:
    return Pruning(
        model=model,
        method=method,
        pattern=Pattern.share(0.4),
        output=folder / method,
        data=data,
        sequences=SEQUENCES,
        length=LENGTH,
        layer_sparsity=SHARES,
        adapter=Path(adapter) if adapter else None,
        reference=model if adapter else None,
    )


def asked(config: dict[str, Any], output: str, **options: Any) -> LoSA:
    settings: dict[str, Any] = {"rounds": 2, "sequences": SEQUENCES, "similar": 8, "length": LENGTH, "ranks": (7, 11)}
    return LoSA(config=RunConfig.from_dict(config), sparsity=0.5, output=Path(output), **settings | options)


def rounds(config: dict[str, Any], output: str) -> tuple[dict[str, Any], list[int]]:
    """The record, and how many linears were alive when each round began to train."""
    alive = []

    def counted(run_config: RunConfig) -> dict[str, Any]:
        gc.collect()
        alive.append(sum(isinstance(found, nn.Linear) for found in gc.get_objects()))
        return run(run_config)

    return losa(asked(config, output), counted), alive


def everything(folder: str, model: str, data: str, adapter: str, config: dict[str, Any]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return parts(folder, model, data, adapter, ("sparsegpt",)), *rounds(config, f"{folder}/losa")
