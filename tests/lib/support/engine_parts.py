"""Engines and their steps, for ranks that run many small cases in one process."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselora_dist.config import RunConfig
from sparselora_dist.engines import Engine
from sparselora_dist.engines.ranks import Ranks
from sparselora_dist.method.tokens import partition_tokens

SPARSE = {"layers": {"ffn": {"0-2": 0.75}, "qk": {"1-2": 0.5}, "vo": {"0-1": 0.5}}}
# Large enough that an update is nearly proportional to its gradient, so that close updates are close gradients.
ADAM_EPSILON = 1e-2


def world() -> Ranks:
    if not dist.is_initialized():
        return Ranks()
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank=rank, local_rank=rank, world_size=size, local_world_size=size)


def run_config(name: str, dtype: str = "float32", folder: str = "tiny", **train: Any) -> RunConfig:
    engine: dict[str, Any] = {"name": name}
    if name == "zero3":
        # Nothing persists, nothing is kept for reuse, nothing is fetched ahead: what is whole is in use.
        keys = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
        engine["deepspeed"] = {"zero_optimization": {"stage": 3} | {f"stage3_{key}": 0 for key in keys}}
    settings = {"output_dir": "runs/tiny", "learning_rate": 1e-2, "adam_epsilon": ADAM_EPSILON, "max_grad_norm": 0.0}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": folder, "dtype": dtype},
            "data": {"train": "tiny.jsonl"},
            "train": settings | train,
            "engine": engine,
        }
    )


def make_engine(config: RunConfig) -> Engine:
    if config.engine.name == "single":
        from sparselora_dist.engines.single import SingleEngine as Kind
    elif config.engine.name == "zero3":
        _name_shared_memory()
        from sparselora_dist.engines.zero3 import Zero3Engine as Kind
    else:
        from sparselora_dist.engines.fsdp2 import FSDP2Engine as Kind
    return Kind(config, world())


def _name_shared_memory() -> None:
    """DeepSpeed names its shared memory by address and port; without them, runs side by side would use the same."""
    if "MASTER_PORT" not in os.environ:
        number = [os.getpid()]
        dist.broadcast_object_list(number, src=0)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(number[0]))


def close(engine: Engine) -> None:
    """Let go of one case's model; the process group stays for the next case."""
    if engine.config.engine.name == "zero3":
        engine.model.destroy()
    del engine.model, engine.optimizer
    gc.collect()
    if dist.is_initialized():  # A rank, which leaves without Python's own exit.
        # What is left are modules, all of which DeepSpeed would look through again when the next case begins.
        gc.freeze()


def train_step(engine: Engine, inputs: dict[str, Tensor], accumulation: int = 1) -> tuple[float, float]:
    """A step on a global batch, cut into micro-batches whose rows are dealt to the ranks: loss and gradient norm."""
    ranks = engine.ranks
    labels, total = partition_tokens(inputs["labels"]).loss_rows.numel(), torch.zeros(())
    for number in range(accumulation):
        mine = {name: t.chunk(accumulation)[number][ranks.rank :: ranks.world_size] for name, t in inputs.items()}
        with engine.autocast():
            loss = engine.model(**mine, use_cache=False, num_items_in_batch=labels / ranks.world_size).loss
        engine.backward(loss, last=number == accumulation - 1)
        total += loss.detach().float()
    return engine.all_sum(total.item() / ranks.world_size)[0], engine.step()


def refusal(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"
