"""What the ranks of ``tests/plan`` run: real engines on tiny models, with resident and gathered bytes counted by kind."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.config import RunConfig
from sparselora_dist.engines import Engine
from sparselora_dist.sharding.parameters import is_zero3

from .engine_parts import close, make_engine, train_step
from .models import batch, tiny_base

STEPS = 2
"""ZeRO-3 records its trace in the first micro-batch and uses it from the second on."""


def build(engine: Engine, data: dict[str, Any], shape: dict[str, Any]) -> Any:
    """The model as a run builds it, from files that rank 0 writes."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        tiny_base(**shape).save_pretrained(folder[0])
    dist.barrier()
    engine.config = RunConfig.from_dict(data | {"model": data["model"] | {"name_or_path": folder[0]}})
    model, _ = build_model(engine.config, engine.placement())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return model


def kind_of(name: str, trainable: bool) -> str:
    if trainable:
        return "lora"
    if "estimator." in name:
        return "factors"
    return "scales" if name.endswith("scales") else "weights"


class Storages:
    """Bytes of the distinct storages that tensors live in, by kind."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.bytes: dict[str, int] = dict.fromkeys(("weights", "scales", "factors", "lora", "optimizer"), 0)

    def add(self, kind: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.seen:
            self.seen[storage.data_ptr()] = storage
            self.bytes[kind] += storage.nbytes()


def resident(engine: Engine, model: Any) -> dict[str, int]:
    """What this rank holds between two steps, without step counters (4 bytes a parameter) and code tables (1 KB each)."""
    found = Storages()
    for name, p in model.named_parameters():
        kind = kind_of(name, p.requires_grad)
        if is_zero3(p):
            found.add(kind, p.ds_tensor)
            if p.ds_secondary_tensor is not None:
                found.add(kind, p.ds_secondary_tensor)
            if p.numel() and p.ds_status.name == "AVAILABLE":
                found.add(kind, p.data)
        else:
            found.add(kind, p.to_local() if hasattr(p, "to_local") else p.data)
    if engine.config.engine.name == "zero3":
        zero = engine.model.optimizer
        found.add("lora", zero.grad_partitions_flat_buffer)
        for flat in zero.fp32_partitioned_groups_flat:
            found.add("optimizer", flat)
    for state in engine.optimizer.state.values():
        for part in ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"):
            if part not in state:
                continue
            value = state[part]
            found.add("optimizer", value.to_local() if hasattr(value, "to_local") else value)
    return found.bytes


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """Bytes of every all-gather's output while it is open, whoever asks for it, by the number of ranks in its group."""
    sizes: dict[int, int] = {}
    originals = {
        name: getattr(dist, name)
        for name in ("all_gather_into_tensor", "all_gather_single", "_all_gather_base", "all_gather")
        if hasattr(dist, name)
    }
    inside = [False]

    def wrap(call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return call(*args, **kwargs)
            output = args[0] if args else kwargs["output_tensor"]
            ranks = dist.get_world_size(kwargs.get("group") or (args[2] if len(args) > 2 else None))
            size = sum(t.nbytes for t in output) if isinstance(output, list) else output.nbytes
            sizes[ranks] = sizes.get(ranks, 0) + size
            inside[0] = True
            try:
                return call(*args, **kwargs)
            finally:
                inside[0] = False

        return counting

    places: list[Any] = [dist, dist.distributed_c10d]
    for place in places:
        for name, call in originals.items():
            setattr(place, name, wrap(call))
    backend: Any = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
    held = getattr(backend, "all_gather_function", None)  # Bound when DeepSpeed starts.
    if held is not None:
        backend.all_gather_function = wrap(held)
    try:
        yield sizes
    finally:
        for place in places:
            for name, call in originals.items():
                setattr(place, name, call)
        if held is not None:
            backend.all_gather_function = held


def case(data: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """A few optimizer steps; the bytes gathered in the last one, and what is resident after it."""
    config = RunConfig.from_dict(data)
    engine = make_engine(config)
    model = build(engine, data, shape)
    engine.prepare(model)
    find_state(model).context.chunk_loss = True  # As the training loop does.
    accumulation = config.train.gradient_accumulation_steps
    rows = config.train.per_device_train_batch_size * engine.ranks.world_size * accumulation
    for step in range(STEPS):
        inputs = batch(rows, 24, seed=step, vocabulary=shape["vocab_size"])
        with counted() as sizes:
            train_step(engine, inputs, accumulation)
    seen = {"resident": resident(engine, model), "gathered": sum(sizes.values()), "by group": sizes}
    close(engine)
    return seen


def cases(runs: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """All cases of one number of ranks in one process start: name -> (run config, model shape)."""
    return {name: case(*arguments) for name, arguments in runs.items()}
