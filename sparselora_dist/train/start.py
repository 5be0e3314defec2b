"""What stands before the model is loaded: the folder, the data, the checkpoint, and that all ranks mean the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config.run import RunConfig
from ..data import GlobalBatchSampler, TokenDataset, load_dataset_tokens
from ..engines import Engine
from ..io.checkpoint import Checkpoint, load_checkpoint, resolve_resume
from ..io.load import load_tokenizer
from ..io.manifest import make_writable
from ..io.run_folder import claim_folder
from ..io.run_lock import RunLock
from ..io.start_adapter import StartAdapter, completed, read_start
from ..io.weights import checkpoint_folder
from ..sharding.placement import Placement
from .disk import check_space
from .fingerprint import Fingerprint, fingerprint, on_all_ranks, same_as_saved
from .shared_folder import check_shared
from .trackers import Trackers, chosen_trackers


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a run starts with."""

    tokenizer: Any
    train_data: TokenDataset
    eval_data: TokenDataset | None
    sampler: GlobalBatchSampler
    total_steps: int
    checkpoint_path: Path | None
    resumed: Checkpoint | None
    """What lies there."""
    fingerprint: Fingerprint
    trackers: Trackers


def read_adapter(config: RunConfig, engine: Engine) -> tuple[RunConfig, StartAdapter | None]:
    """The run with what the adapter of ``lora.init_from`` says, and its values; without one as it is. A collective.

    Raises:
        ConfigError, OSError, ValueError: see :mod:`sparselora_dist.io.start_adapter`.
    """
    with _together(engine)():  # Also without one: another rank's file may name one.
        config = completed(config)
        return config, read_start(config)


def _together(engine: Engine) -> Callable[[], AbstractContextManager[None]]:
    return Placement(engine.device, group=dist.group.WORLD).together


def begin(config: RunConfig, engine: Engine, base: Any, held: ExitStack, start: StartAdapter | None = None) -> Begun:
    """Everything that can be refused without the model. A collective: what one rank finds wrong ends all of them.

    Args:
        config: the run.
        engine: is told the number of steps.
        base: the base model's config.
        held: what ends with the run: the lock on its folder, and the trackers.
        start: the adapter that the run starts from.
    """
    output_dir = Path(config.train.output_dir)
    together = _together(engine)
    with together():
        if engine.is_main:
            chosen_trackers(config.train)
            make_writable(output_dir, "train.output_dir")
            if config.train.logging_dir:
                make_writable(Path(config.train.logging_dir), "train.logging_dir")
            held.enter_context(closing(RunLock.take(output_dir)))
    check_shared(output_dir, config.train.resume)
    with together():
        tokenizer = load_tokenizer(config.model)
        train_data, eval_data = _datasets(config, tokenizer)
        sampler = GlobalBatchSampler(
            train_data.lengths,
            config.train.per_device_train_batch_size,
            engine.ranks.world_size,
            config.train.gradient_accumulation_steps,
            config.train.seed,
            config.train.group_by_length,
        )
        total_steps = _total_steps(config, sampler)
        path = resolve_resume(config.train.resume, output_dir)
        resumed = load_checkpoint(path) if path else None
        own = fingerprint(config, base, checkpoint_folder(config.model.name_or_path), train_data, start)
        if resumed and path:
            _check_resume(resumed, sampler.global_batch_size, total_steps, path)
            same_as_saved(own, resumed.state.fingerprint, path)
    on_all_ranks(config, own, eval_data, path)
    engine.total_steps = total_steps
    done = resumed.state.step if resumed else 0
    trackers = Trackers()
    with together():
        if engine.is_main:
            check_space(config, base, engine.ranks.world_size, total_steps - done)
            claim_folder(output_dir, config.train.resume, path, done)
            trackers = held.enter_context(closing(Trackers.start(config, done)))
    return Begun(
        tokenizer=tokenizer,
        train_data=train_data,
        eval_data=eval_data,
        sampler=sampler,
        total_steps=total_steps,
        checkpoint_path=path,
        resumed=resumed,
        fingerprint=own,
        trackers=trackers,
    )


def _datasets(config: RunConfig, tokenizer: Any) -> tuple[TokenDataset, TokenDataset | None]:
    data = config.data
    train = load_dataset_tokens(data.train, tokenizer, data.max_length, "train", data.train_limit)
    if data.eval is None:
        return train, None
    return train, load_dataset_tokens(
        data.eval, tokenizer, data.max_length, "validation", data.eval_limit, key="data.eval"
    )


def _total_steps(config: RunConfig, sampler: GlobalBatchSampler) -> int:
    if config.train.max_steps > 0:
        return config.train.max_steps
    return max(1, math.ceil(config.train.num_train_epochs * sampler.batches_per_epoch))


def _check_resume(resumed: Checkpoint, global_batch_size: int, total_steps: int, path: Path) -> None:
    if resumed.state.global_batch_size != global_batch_size:
        raise ValueError(
            f"{path} was saved with a global batch of {resumed.state.global_batch_size}, this run has "
            f"{global_batch_size} (ranks x per_device_train_batch_size x gradient_accumulation_steps): make them equal, "
            "so that no row is skipped or repeated"
        )
    if resumed.state.step > total_steps:
        raise ValueError(f"{path} is at step {resumed.state.step}, beyond this run's {total_steps} steps")
