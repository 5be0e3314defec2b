"""What the ranks of ``tests/engines/test_optimizers.py`` run: optimizers under one engine, in one process start."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.config import RunConfig
from sparselora_dist.engines import Engine

from .engine_parts import close, make_engine, run_config, train_step
from .models import ATTENTION, batch, tiny_base
from .sharding_workers import TOKENS, WIDE

STEPS, SAVED, LEARNING_STEPS = 4, 2, 30
# Saved by the left one, continued by the right one.
CONVERSIONS = (("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch"), ("adamw_torch_fused", "adamw_torch"))
RANK = 97
"""Odd, so that shards are uneven; high enough that all shards of 2 ranks but those of k's and v's B have 8-bit states."""


def model() -> Any:
    base = tiny_base(**WIDE)
    torch.manual_seed(3)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, task_type="CAUSAL_LM")
    lora_model = get_peft_model(base, lora).train()
    layers = {group: {"0-1": 0.25} for group in ("ffn", "qk", "vo")}
    return apply_sparselora(lora_model, SparseLoRAConfig.from_dict({"layers": layers, "rank": 4}))


def start(name: str, optim: str | None) -> Engine:
    config: RunConfig = run_config(name, optim=optim, adam_epsilon=1e-8, learning_rate=1e-3, weight_decay=0.1)
    engine = make_engine(config)
    engine.prepare(model())
    return engine


def saved(engine: Engine) -> dict[str, Any]:
    moments, steps = engine.full_moments()
    parameters = engine.full_parameters()
    return {"parameters": parameters, "moments": moments, "steps": steps, "codes": engine.own_codes()}


def steps(engine: Engine, first: int, last: int) -> list[float]:
    return [
        train_step(engine, batch(4, TOKENS, seed=step, vocabulary=16, padding=False))[0] for step in range(first, last)
    ]


def continued(name: str, optim: str, state: dict[str, Any]) -> dict[str, Any]:
    """A new engine that loads ``state`` and goes on to the end."""
    engine = start(name, optim)
    exact = engine.load_state(**state)
    loaded = saved(engine)
    losses = steps(engine, SAVED, STEPS)
    seen = {"exact": exact, "loaded": loaded, "losses": losses, "end": saved(engine)}
    close(engine)
    return seen


def straight(name: str, optim: str) -> dict[str, Any]:
    """All steps in one go, with the state after SAVED of them; then the same from that state on."""
    engine = start(name, optim)
    losses = steps(engine, 0, SAVED)
    halfway = saved(engine)
    losses += steps(engine, SAVED, STEPS)
    seen = {"kind": type(engine.optimizer).__name__, "losses": losses, "halfway": halfway, "end": saved(engine)}
    close(engine)
    return seen | {"resumed": continued(name, optim, halfway)}


def single() -> dict[str, Any]:
    """Every optimizer; and states of one continued by another."""
    optims = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
    seen: dict[str, Any] = {optim: straight("single", optim) for optim in optims}
    seen["learns"] = {optim: learns(optim) for optim in optims}
    for source, target in CONVERSIONS:
        seen[f"{source} to {target}"] = continued("single", target, seen[source]["halfway"])
    return seen


def sharded(name: str, from_single: dict[str, Any]) -> dict[str, Any]:
    """Those that are new here; and the 8-bit state that one process left, whose codes fit no shard."""
    seen: dict[str, Any] = {optim: straight(name, optim) for optim in ("adamw_torch_fused", "adamw_8bit")}
    return seen | {"from single": continued(name, "adamw_8bit", from_single)}


def learns(optim: str) -> list[float]:
    """Losses of 30 steps on one batch, in one process."""
    engine = start("single", optim)
    losses = [
        train_step(engine, batch(4, TOKENS, seed=0, vocabulary=16, padding=False))[0] for _ in range(LEARNING_STEPS)
    ]
    close(engine)
    return losses
