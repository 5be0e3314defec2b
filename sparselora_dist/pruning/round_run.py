"""The run of a round: the user's, on that round's base, from the last round's adapter, for its part of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config.run import RunConfig
from .resize import patterns


def round_config(
    config: RunConfig,
    model: Path,
    output: Path,
    start: Path | None,
    ranks: Mapping[str, int],
    part: tuple[float, float],
    seed: int,
    smallest: float,
) -> RunConfig:
    """Args:
    config: the user's.
    model: the pruned base.
    output: the run's folder.
    start: an adapter to start from, or None for a fresh one.
    ranks: by the layers' paths.
    part: from where to where in the user's run, as shares of its length.
    seed: added to the run's, so that a round sees other rows than the last.
    smallest: the smallest sparsity of a layer.
    """
    data: dict[str, Any] = config.to_dict()
    data["model"] |= {"name_or_path": str(model)}
    lora: dict[str, Any] = data["lora"]
    lora |= patterns(ranks, lora)
    base: dict[str, Any] = data["sparse_base"] | {"enabled": True}
    # A first round takes few: they are zeros all the same. The others of a 4-bit matrix are fewer than half of these.
    base["min_sparsity"] = min(base["min_sparsity"], smallest / 2)
    if start:
        lora.pop("init_lora_weights", None)
        lora["init_from"] = str(start)
        base["start"] = "lora"
    data["sparse_base"] = base
    data["train"] |= _length(data["train"], part) | {
        "output_dir": str(output),
        "resume": "auto",
        "seed": data["train"]["seed"] + seed,
    }
    return RunConfig.from_dict(data)


def parts_of_run(rounds: int, last: float) -> list[tuple[float, float]]:
    """From where to where each round goes: the last takes ``last`` of the run, the others equal parts of the rest."""
    if rounds == 1:
        return [(0.0, 1.0)]
    step = (1 - last) / (rounds - 1)
    bounds = [number * step for number in range(rounds)] + [1.0]
    return list(pairwise(bounds))


def _length(train: dict[str, Any], part: tuple[float, float]) -> dict[str, Any]:
    """The keys that say how long, of a part of a run; at least a step."""
    first, last = part
    found: dict[str, Any] = {"num_train_epochs": max(train["num_train_epochs"] * (last - first), 1e-9)}
    if train["max_steps"] > 0:
        found["max_steps"] = max(round(train["max_steps"] * last) - round(train["max_steps"] * first), 1)
    if train["warmup_steps"] > 0:
        found["warmup_steps"] = max(round(train["warmup_steps"] * (last - first)), 1)
    return found
