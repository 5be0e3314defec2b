"""One run, built in order: ranks, data, model, adapter, sparsity, engine, loop."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import closing
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from ..apply import find_state
from ..apply.build import build_model
from ..apply.liger import liger_patch
from ..config.run import RunConfig
from ..data import GlobalBatchSampler, TokenDataset, load_dataset_tokens, padding_id
from ..engines import Engine, make_engine
from ..io.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, resolve_resume
from ..io.load import LoadReport, check_model, load_tokenizer
from ..io.manifest import make_writable, write_text
from ..io.model_card import write_model_card
from ..io.weights import checkpoint_folder
from ..process import SaidElsewhere
from ..sharding.placement import Placement
from .loop import TrainingLoop
from .metrics import flop_model
from .stopping import Stopped, StopSignals
from .trackers import Trackers, chosen_trackers

log = logging.getLogger(__name__)


def run(config: RunConfig) -> dict[str, Any]:
    """Train by ``config``; returns what ``summary.json`` holds.

    Everything that can be refused is refused before the model is loaded.
    """
    with StopSignals(Path(config.train.output_dir), os.environ.get("RANK", "0") == "0") as stop:
        # Before the ranks wait for each other: a download takes as long as it takes.
        checkpoint_folder(config.model.name_or_path)
        try:
            engine = make_engine(config)
        except Stopped as error:
            # All ranks were told, and there is no heartbeat yet by which they agree who says so.
            if stop.speaks:
                raise
            raise SaidElsewhere(1) from error
        engine.heartbeat.at("loading")
        try:
            summary = _run(config, engine, stop)
        except BaseException as error:
            stop.waits = True  # The run ends already.
            engine.heartbeat.explain(error)
            raise
        # After an error the group is left alone: closing it could wait for ranks that are stuck, ahead of the message.
        engine.close()
    return summary


def _run(config: RunConfig, engine: Engine, stop: StopSignals) -> dict[str, Any]:
    output_dir = Path(config.train.output_dir)
    if not engine.is_main:
        disable_progress_bar()
    family = check_model(config.model).model_type
    if config.train.use_liger_kernel:
        liger_patch(family)  # Refuses what cannot work.
    # What rank 0 alone finds wrong must end all ranks.
    together = Placement(engine.device, group=dist.group.WORLD).together
    with together():
        if engine.is_main:
            chosen_trackers(config.train)
            make_writable(output_dir, "train.output_dir")
            if config.train.logging_dir:
                make_writable(Path(config.train.logging_dir), "train.logging_dir")
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
    if resumed:
        _check_resume(resumed, sampler.global_batch_size, total_steps, path)
    engine.total_steps = total_steps
    trackers = Trackers()
    with together():
        if engine.is_main:
            if not resumed and (old := list_checkpoints(output_dir)):
                raise ValueError(
                    f"train.output_dir {output_dir} holds {old[-1].name} of an earlier run: continue it with train.resume "
                    "true, or use another folder"
                )
            trackers = Trackers.start(config, resumed.state.step if resumed else 0)
    with closing(trackers):
        set_seed(config.train.seed)
        model, report = build_model(
            config,
            engine.placement(),
            local_ranks=engine.ranks.local_world_size,
            progress=engine.is_main,
            adapter=path / "adapter" if path else None,
        )
        load = _report_load(report, config, engine)
        state = find_state(model)
        assert state is not None
        flops = flop_model(model, state)
        engine.prepare(model)

        loop = TrainingLoop(
            config=config,
            engine=engine,
            context=state.context,
            train_data=train_data,
            eval_data=eval_data,
            sampler=sampler,
            pad_token_id=padding_id(tokenizer),
            total_steps=total_steps,
            flops=flops,
            resumed=resumed,
            trackers=trackers,
            stop=stop,
        )
        if engine.is_main:
            write_text(output_dir / "run.json", json.dumps(config.to_dict(), indent=1))
        summary = loop.run() | {"load": load}
        engine.heartbeat.at("closing")
        if engine.is_main:
            write_text(output_dir / "sparse_lora.json", json.dumps(config.sparse_lora.to_dict(), indent=1))
            write_text(output_dir / "summary.json", json.dumps(summary, indent=1))
            tokenizer.save_pretrained(output_dir / "adapter")
            write_model_card(model, output_dir / "adapter", config, summary)
        engine.barrier()
        return summary


def _report_load(report: LoadReport, config: RunConfig, engine: Engine) -> dict[str, float]:
    """The ranks' highest figures, said on rank 0."""
    figures = engine.all_max(*astuple(report))
    seconds, kept, host, device = figures
    if engine.is_main:
        gpu = f", {device / 1e9:.2f} GB device" if device else ""
        log.info(
            "%s loaded in %.1f s: %.2f GB of frozen weights a rank, peak %.2f GB host%s",
            config.model.name_or_path,
            seconds,
            kept / 1e9,
            host / 1e9,
            gpu,
        )
    return {field.name: value for field, value in zip(fields(report), figures)}


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


def _check_resume(resumed: Checkpoint, global_batch_size: int, total_steps: int, path: Path | None) -> None:
    if resumed.state.global_batch_size != global_batch_size:
        raise ValueError(
            f"{path} was saved with a global batch of {resumed.state.global_batch_size}, this run has "
            f"{global_batch_size} (ranks x per_device_train_batch_size x gradient_accumulation_steps): make them equal, "
            "so that no row is skipped or repeated"
        )
    if resumed.state.step > total_steps:
        raise ValueError(f"{path} is at step {resumed.state.step}, beyond this run's {total_steps} steps")
