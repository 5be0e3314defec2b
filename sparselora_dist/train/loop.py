"""The training loop: the same for every engine."""

from __future__ import annotations

import logging
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import get_scheduler

from ..config.run import RunConfig
from ..data import GlobalBatch, GlobalBatchSampler, PackedBatch, TokenDataset
from ..engines import Engine
from ..io.checkpoint import Checkpoint
from ..layers.context import SparseContext
from ..method.flops import FlopModel
from .evaluate import FIGURES, evaluate
from .feed import Feed
from .fingerprint import Fingerprint
from .metrics import MetricsWriter
from .nonfinite import own_nonfinite
from .saving import Saver
from .stopping import Stopped, StopSignals
from .totals import StepResult, Totals
from .trackers import Trackers

log = logging.getLogger(__name__)


class TrainingLoop:
    """Runs the steps of one run. Every rank has one and calls :meth:`run`."""

    def __init__(
        self,
        *,
        config: RunConfig,
        engine: Engine,
        context: SparseContext,
        train_data: TokenDataset,
        eval_data: TokenDataset | None,
        sampler: GlobalBatchSampler,
        pad_token_id: int,
        total_steps: int,
        flops: FlopModel,
        resumed: Checkpoint | None = None,
        trackers: Trackers | None = None,
        fingerprint: Fingerprint | None = None,
        stop: StopSignals | None = None,
    ) -> None:
        self.config, self.train, self.engine, self.context = config, config.train, engine, context
        self.train_data, self.eval_data, self.sampler = train_data, eval_data, sampler
        self.pad_token_id, self.total_steps, self.flops = pad_token_id, total_steps, flops
        self.fingerprint = fingerprint or {}
        self.totals = Totals()
        self.feed = self._feed(train_data)
        self.start_step = 0
        self.scheduler = self._scheduler()
        self.saver = Saver(self.train, engine, context)
        self.stop = stop or StopSignals(Path(self.train.output_dir))
        if resumed:
            self._restore(resumed)
        self.metrics = MetricsWriter(config.train, total_steps, self.start_step, engine.is_main, trackers)

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All remaining steps; returns the summary."""
        # One wait per optimizer step instead of one per forward: see _optimize. Nobody reads logits.
        self.context.check_masks, self.context.chunk_loss = "caller", True
        self.stop.waits = True
        try:
            step = self.start_step
            if self.eval_data is not None and not self.totals.eval_start:
                self.totals.eval_start = self._evaluate(0)
            elif self._evaluation_was_cut_off():
                self._evaluate(step)
            while step < self.total_steps:
                self._one_step(step)
                step += 1
                due = bool(self.train.save_steps) and step % (self.train.save_steps or 1) == 0
                stop = self._stops()
                if due or stop:
                    self._save(step)
                if stop:
                    self._leave(step)
                if self.train.eval_steps and step % self.train.eval_steps == 0 and step < self.total_steps:
                    self._evaluate(step)
            # Whatever happens in the last evaluation, what was trained is on the disk.
            self.saver.save_adapter()
            summary = self._summary(self._evaluate(self.total_steps))
            self.saver.wait()
            return summary
        finally:
            self.saver.close()
            self.metrics.close()
            self.context.check_masks, self.context.chunk_loss = "next", False

    def _evaluation_was_cut_off(self) -> bool:
        """Whether a resumed run's last step was to be evaluated and was not. A collective."""
        step, every = self.start_step, self.train.eval_steps
        if self.eval_data is None or not every or step % every or not 0 < step < self.total_steps:
            return False
        return self.engine.all_max(float(self.metrics.lacks_evaluation))[0] > 0

    def _one_step(self, step: int) -> None:
        batch = self.feed.laid_out(self.sampler.batch(step))
        labels = int(self.train_data.label_counts[batch.indices].sum())
        lengths = self.train_data.lengths[batch.indices]
        learning_rate = self._learning_rate()
        self.context.set_step(step, self.total_steps)
        started = time.perf_counter()
        if labels == 0:
            log.warning(
                "step %d: no row of the batch has a label (every label is -100); it contributes nothing", step + 1
            )
            result = StepResult(loss=0.0, grad_norm=0.0, context=0.0)
        else:
            result = self._optimize(step, batch, labels)
        if not self._deepspeed_schedules:  # DeepSpeed's own is stepped by its engine.
            self.scheduler.step()
        seconds = time.perf_counter() - started
        logits = labels if self.context.skip_unused_logits else None
        self._record(step, result, lengths, logits, batch.accumulation, seconds, learning_rate)

    def _optimize(self, step: int, batch: GlobalBatch | PackedBatch, labels: int) -> StepResult:
        """Forward and backward of every micro-batch, then the optimizer."""
        engine, world = self.engine, self.engine.ranks.world_size
        counts = self.context.counts
        counts.dense = counts.context = 0
        loss = self.forward_backward(step, batch, labels)
        engine.heartbeat.at(f"optimizer of step {step + 1}")
        self.context.sync.check()  # No step is taken on masks that the ranks did not agree on.
        bad = not engine.gradients_are_finite()
        total, context, bad_ranks = engine.all_sum(loss.item() / world, counts.context, float(bad))
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss of step {step + 1} is {total}: no step was taken. Lower train.learning_rate, or continue "
                "from the last checkpoint with train.resume true"
            )
        if bad_ranks:
            held = engine.nonfinite_gradients()
            arose = own_nonfinite(engine, partial(self.forward_backward, step, batch, labels))
            engine.refuse_gradients(f"step {step + 1}", arose, held)
        return StepResult(total, engine.step(), context)

    def forward_backward(self, step: int, batch: GlobalBatch | PackedBatch, labels: int) -> Tensor:
        """Of every micro-batch; this rank's sum of the losses."""
        engine, world = self.engine, self.engine.ranks.world_size
        loss = torch.zeros((), device=engine.device)
        for number in range(batch.accumulation):
            engine.heartbeat.at(f"forward of step {step + 1}")
            inputs = self.feed.inputs(batch.micro_batch(number, engine.ranks.rank))
            self.context.hand_over(inputs.labels, inputs.partition)
            with engine.autocast():
                # Engines average gradients over ranks: labels / world makes it the mean over the global batch.
                output = engine.model(
                    **inputs.arguments, labels=inputs.labels, use_cache=False, num_items_in_batch=labels / world
                )
            engine.heartbeat.at(f"backward of step {step + 1}")
            engine.backward(output.loss, last=number == batch.accumulation - 1)
            loss += output.loss.detach()
        return loss

    def _record(
        self,
        step: int,
        result: StepResult,
        lengths: Any,
        logits: int | None,
        accumulation: int,
        seconds: float,
        learning_rate: float,
    ) -> None:
        tokens, totals = float(lengths.sum()), self.totals
        # Mean length that a token sees, so that the quadratic part of attention is counted right.
        length = float((lengths.astype(float) ** 2).sum()) / max(tokens, 1.0)
        dense_flops = self.flops.dense(tokens, length)
        # Padding is computed by plain LoRA and not here; only real tokens are counted, on both sides.
        products = accumulation * self.engine.ranks.world_size
        executed = self.flops.executed(tokens - result.context, result.context, length, logits, products)
        totals.tokens += tokens
        totals.context += result.context
        totals.flops_dense += dense_flops
        totals.flops_executed += executed
        if step > self.start_step:  # The first step of a process also warms up allocators and caches.
            totals.timed_tokens += tokens
            totals.seconds += seconds
        if step == 0:
            totals.loss_first = result.loss
        totals.loss_last = result.loss
        rate = tokens / seconds / self.engine.ranks.world_size
        share = result.context / tokens if tokens else 0.0
        if (step + 1) % self.train.logging_steps == 0 or step + 1 == self.total_steps:
            self.metrics.row(
                {
                    "step": step + 1,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": learning_rate,
                    "num_tokens": totals.tokens,
                    "tokens_per_second_per_gpu": rate,
                    "sparsity/active": float(self.context.is_sparse),
                    "sparsity/context_share": share,
                    "sparsity/executed_flops_share": executed / dense_flops if dense_flops else 1.0,
                }
            )
        self.metrics.advance(result.loss, rate * self.engine.ranks.world_size, share)

    def _feed(self, dataset: TokenDataset) -> Feed:
        return Feed(self.config, self.engine, dataset, self.pad_token_id, self.flops.quadratic)

    # --- learning rate ------------------------------------------------------------------------------------------------

    def _scheduler(self) -> Any:
        if self._deepspeed_schedules:
            return self.engine.scheduler
        train = self.train
        warmup = train.warmup_steps or math.ceil(train.warmup_ratio * self.total_steps)
        return get_scheduler(train.lr_scheduler_type, self.engine.optimizer, warmup, self.total_steps)

    @property
    def _deepspeed_schedules(self) -> bool:
        return self.engine.scheduler is not None

    def _learning_rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    # --- evaluation and summary ---------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.eval_data is None:
            return {}
        size = self.train.per_device_eval_batch_size or self.train.per_device_train_batch_size
        bar = self.engine.is_main and not self.train.disable_tqdm
        self.engine.heartbeat.at(f"evaluation at step {step}")
        found = evaluate(self.engine, self.context, self._feed(self.eval_data), size, bar, self._stops)
        if found is None:
            self._leave(step)
        values = found.row()
        self.metrics.row({"step": step, **values})
        return values

    def _summary(self, final: dict[str, float]) -> dict[str, Any]:
        totals = self.totals
        return {
            "engine": self.config.engine.name,
            "world_size": self.engine.ranks.world_size,
            "steps": self.total_steps,
            "tokens": int(totals.tokens),
            "train_loss_first": totals.loss_first,
            "train_loss_last": totals.loss_last,
            **{f"{name}_start": totals.eval_start.get(name) for name in FIGURES},
            **({"eval_loss": None} | final),
            "context_share": totals.context / max(totals.tokens, 1.0),
            "executed_flops_share": totals.flops_executed / max(totals.flops_dense, 1.0),
            "tokens_per_second": totals.timed_tokens / totals.seconds if totals.seconds else None,
            "mask_collectives": self.context.sync.collectives,
            "adapter": str(Path(self.train.output_dir) / "adapter"),
        }

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        self.saver.save(
            step,
            global_batch_size=self.sampler.global_batch_size,
            tokens=int(self.totals.tokens),
            scheduler=_plain(self.scheduler.state_dict()),
            summary={name: getattr(self.totals, name) for name in Totals.__slots__},
            fingerprint=self.fingerprint,
        )

    def _stops(self) -> bool:
        """Whether the ranks stop here: one was told to, or could not write. A collective."""
        told, failed = self.engine.all_sum(float(bool(self.stop.asked)), float(self.saver.failed))
        if failed:
            self.saver.wait()  # Raises on the rank that could not.
            raise RuntimeError("another rank could not write a checkpoint")
        return told > 0

    def _leave(self, step: int) -> NoReturn:
        """Save, unless it is saved or there is nothing to save, and end the run."""
        # Whichever rank says it, its launcher may end the others before they can: all know what one was told.
        (number,) = self.engine.all_max(float(signal.Signals[self.stop.asked] if self.stop.asked else 0))
        told, step = signal.Signals(int(number)).name, max(step, self.start_step)
        if step > 0 and self.saver.saved != step:
            self._save(step)
        self.saver.wait()
        folder = self.train.output_dir
        if step == 0:
            raise Stopped(f"{told}: no step was taken yet, {folder} holds nothing to resume: start the run again")
        raise Stopped(f'{told}: saved checkpoint-{step} in {folder}; train.resume true (or "auto") continues it')

    def _restore(self, resumed: Checkpoint) -> None:
        self.saver.restore(resumed)
        state = resumed.state
        if state.scheduler.keys() != _plain(self.scheduler.state_dict()).keys():
            raise ValueError(
                "the checkpoint's learning rate schedule is of another kind than this run's: use the same one"
            )
        self.scheduler.load_state_dict(state.scheduler)
        if self._deepspeed_schedules:
            self.scheduler.step(self.scheduler.last_batch_iteration)
        else:
            for group, rate in zip(self.engine.optimizer.param_groups, self.scheduler.get_last_lr()):
                group["lr"] = rate
        self.start_step = state.step
        self.totals = Totals(**state.summary)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which are made again from the config."""
    return {name: value for name, value in state.items() if isinstance(value, (int, float, list, bool))}
