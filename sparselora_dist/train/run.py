"""One run, built in order: ranks, data, model, adapter, sparsity, engine, loop."""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from ..apply import find_state
from ..apply.build import build_model
from ..apply.fit import fit_run
from ..apply.liger import liger_patch
from ..apply.loftq import loftq_start
from ..config.run import RunConfig
from ..data import padding_id
from ..engines import Engine, make_engine
from ..io.load import LoadReport, check_model
from ..io.manifest import write_text
from ..io.model_card import write_model_card
from ..io.pretrained import check_positions
from ..io.weights import checkpoint_folder
from ..process import SaidElsewhere
from .gradient_start import start_at_gradient
from .loop import TrainingLoop
from .metrics import flop_model
from .saving import start_at, start_from
from .start import begin, read_adapter
from .stopping import Stopped, StopSignals

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
    base = check_model(config.model)
    if config.train.use_liger_kernel:
        liger_patch(base.model_type)  # Refuses what cannot work.
    check_positions(base, config.data.max_length)
    config, start = read_adapter(config, engine)
    config, unpacked = fit_run(config, base)
    if unpacked and engine.is_main:
        log.info("rows are padded, not packed: %s", unpacked)
    with ExitStack() as held:
        begun = begin(config, engine, base, held, start)
        path = begun.checkpoint_path
        set_seed(config.train.seed)
        placement = engine.placement()
        loftq = loftq_start(config, placement, path / "adapter" if path else None)
        model, report = build_model(
            config,
            placement,
            local_ranks=engine.ranks.local_world_size,
            progress=engine.is_main,
            adapter=path / "adapter" if path else None,
            start=start,
            loftq=loftq,
        )
        load = _report_load(report, config, engine)
        state = find_state(model)
        assert state is not None
        flops = flop_model(model, state)
        engine.prepare(model)
        if start and not path:
            start_from(start, engine)
        if loftq and not path:
            start_at(loftq.parameters(), engine)
        loftq = None  # It is as large as the adapter.

        loop = TrainingLoop(
            config=config,
            engine=engine,
            context=state.context,
            train_data=begun.train_data,
            eval_data=begun.eval_data,
            sampler=begun.sampler,
            pad_token_id=padding_id(begun.tokenizer),
            total_steps=begun.total_steps,
            flops=flops,
            resumed=begun.resumed,
            trackers=begun.trackers,
            fingerprint=begun.fingerprint,
            stop=stop,
        )
        if config.sparse_base.enabled and config.sparse_base.start == "gradient" and not path:
            start_at_gradient(loop, state.masked, config.sparse_base.start_rows)
        if engine.is_main:
            write_text(output_dir / "run.json", json.dumps(config.to_dict(), indent=1))
        summary = loop.run() | {"load": load}
        engine.heartbeat.at("closing")
        if engine.is_main:
            write_text(output_dir / "sparse_lora.json", json.dumps(config.sparse_lora.to_dict(), indent=1))
            write_text(output_dir / "summary.json", json.dumps(summary, indent=1))
            begun.tokenizer.save_pretrained(output_dir / "adapter")
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
