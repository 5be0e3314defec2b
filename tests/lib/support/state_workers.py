"""Engine state as whole tensors, and steps with clipping and accumulation."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, set_step
from sparselora_dist.engines import Engine

from .engine_parts import SPARSE, close, make_engine, run_config, train_step
from .models import batch, tiny_lora
from .sharding_workers import TOKENS, wide_model

# name: (max_grad_norm, accumulation, sparse)
VARIANTS = {
    "whole": (0.0, 1, False),
    "parts": (0.0, 2, False),
    "clipped": (0.05, 1, False),
    "clipped parts": (0.05, 2, False),
    "sparse parts": (0.05, 2, True),
}
State = tuple[dict[str, Tensor], dict[str, Tensor], int]


def variants(name: str) -> dict[str, Any]:
    """Two steps with and without clipping, in one piece and accumulated."""
    seen: dict[str, Any] = {}
    for label, (limit, accumulation, sparse) in VARIANTS.items():
        size = 4 // dist.get_world_size() // accumulation
        train = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size}
        engine = make_engine(run_config(name, max_grad_norm=limit, **train))
        model = apply_sparselora(tiny_lora(), SparseLoRAConfig.from_dict({**SPARSE, "start_step": 1}))
        set_step(model, int(sparse), 2)
        engine.prepare(model)
        steps = [train_step(engine, batch(4, 24, seed=seed), accumulation) for seed in range(2)]
        seen[label] = {"steps": steps, "parameters": engine.full_parameters(), "count": engine.full_moments()[1]}
        close(engine)
    return seen


def state_of(engine: Engine) -> State:
    return engine.full_parameters(), *engine.full_moments()


def continue_from(name: str, state: State | None, first: int, steps: int) -> dict[str, Any]:
    """``steps`` steps of an odd-sized model from ``state`` (or the start): losses, the state as loaded and after."""
    engine = make_engine(run_config(name))
    model = wide_model()
    engine.prepare(model)
    seen: dict[str, Any] = {"fresh": state_of(engine), "losses": []}
    if state is not None:
        engine.load_state(*state)
        seen["loaded"] = state_of(engine)
    for step in range(first, first + steps):
        seen["losses"].append(train_step(engine, batch(4, TOKENS, seed=step, vocabulary=16, padding=False))[0])
    seen["state"] = state_of(engine)
    if state is None:
        # Round trip in place, after something else was there.
        kept = state_of(engine)
        train_step(engine, batch(4, TOKENS, seed=50, vocabulary=16, padding=False))
        engine.load_state(*kept)
        seen["kept"], seen["back"] = kept, state_of(engine)
        seen["next"] = train_step(engine, batch(4, TOKENS, seed=first + steps, vocabulary=16, padding=False))[0]
        seen["after next"] = state_of(engine)
    close(engine)
    return seen
