"""Whole training steps for benchmarks/gpu.py: SparseLoRA against dense PEFT LoRA, checked before they are timed.

``busy`` is the time in which a kernel runs: what is missing to the step's own time is the host's, which came too late with
the next one. FLOPs (``ideal``, ``dense_tflops``) are those of the step without the recomputation of activation
checkpointing. ``dense_gb`` and ``sparse_gb`` are the peaks that each side would have alone: both models are on the device,
and what belongs to the other is taken off.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from gpu_correct import TOLERANCE, check_step
from gpu_models import SETTINGS, forget_parts, make_pair, plain_copy, sparse_state
from gpu_profile import busy_seconds
from gpu_sides import Side, make_batch
from gpu_timing import free, no_collection, rounded, start_peak, timed
from shapes import SHAPES
from torch import Tensor, nn

from sparselora_dist.layouts import causal_lm
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.train.metrics import flop_model

WARM_UP = 2
"""Turns: the first compiles, the second lets the allocator settle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two models of a case."""

    shape: str
    layers: int
    storage: str
    """``plain`` (bf16), or ``nf4``."""
    setting: str
    dtype: torch.dtype
    length: int
    """Tokens of a row."""

    @property
    def name(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"{self.shape} {kind if self.storage == 'plain' else self.storage} {self.setting}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row: a batch with or without activation checkpointing."""

    pair: Pair
    tokens: int
    context: float
    checkpointing: bool
    batch: str = "full"
    """A kind of :data:`gpu_sides.KINDS`."""
    rows: int | None = None
    """Most tokens of a row, where that is less than the pair's."""

    @property
    def name(self) -> str:
        kind = "checkpointing" if self.checkpointing else "no checkpointing"
        what = f"{self.pair.name}, {self.pair.layers} layers, {self.tokens} tokens, context {self.context:.0%}"
        return f"{what}, {self.batch}, {kind}"


class Models:
    """Both models of a pair on the device."""

    def __init__(self, pair: Pair, device: torch.device) -> None:
        self.pair, self.device, self.shape = pair, device, SHAPES[pair.shape]
        options: dict[str, Any] = {"device": device, "dtype": pair.dtype, "length": pair.length}
        dense, sparse = make_pair(self.shape, pair.layers, pair.storage, SETTINGS[pair.setting], **options)
        self.dense, self.sparse = (Side(model, device, pair.dtype) for model in (dense, sparse))
        self.flops = flop_model(sparse, sparse_state(sparse))

    @property
    def vocabulary(self) -> int:
        return causal_lm(self.sparse.model).config.vocab_size

    def batch(self, tokens: int, context: float, kind: str = "full", length: int | None = None) -> dict[str, Tensor]:
        return make_batch(self.vocabulary, tokens, length or self.pair.length, context, self.device, kind)

    def check(self, tokens: int, context: float) -> dict[str, Any]:
        """A row: how far the gradients are from the masked dense step's, see :func:`check_step`."""
        pair, reference = self.pair, self.dense
        if pair.storage != "plain":  # bitsandbytes quantises down and o in the other direction.
            options: dict[str, Any] = {"device": self.device, "dtype": pair.dtype, "length": pair.length}
            reference = Side(plain_copy(self.sparse.model, self.shape, **options), self.device, pair.dtype)
        worst, overall = check_step(reference, self.sparse, self.batch(tokens, context))
        most = TOLERANCE[pair.dtype]
        return {
            "what": pair.name,
            "worst matrix": worst,
            "all": overall,
            "allowed": list(most),
            "right": worst <= most[0] and overall <= most[1],
        }

    def measure(self, case: Case, seconds: float) -> dict[str, Any]:
        """One row; about ``seconds`` of repeats, three at least."""
        batch = self.batch(case.tokens, case.context, case.batch, case.rows)
        sides = {"dense": self.dense, "sparse": self.sparse}
        for side in sides.values():
            side.checkpointing(case.checkpointing)
        peaks: dict[str, float | None] = {}
        alive = {}
        for name, side in sides.items():
            fits, peaks[name] = self._warm_up(side, batch)
            if fits:
                alive[name] = side
        times: dict[str, list[float]] = {name: [] for name in sides}
        started = time.perf_counter()
        with no_collection():
            while alive and (len(times[next(iter(alive))]) < 3 or time.perf_counter() - started < seconds):
                for name, side in alive.items():
                    times[name].append(timed(lambda side=side: side.step(batch), self.device))
        busy = {name: busy_seconds(side, batch, self.device) for name, side in alive.items()}
        return self._row(case, batch, times, peaks, busy)

    def _warm_up(self, side: Side, batch: dict[str, Tensor]) -> tuple[bool, float | None]:
        """Whether a step fits, and the peak of memory that this side alone needs, in GB."""
        try:
            for _ in range(WARM_UP):
                free()
                side.step(batch)
                before = start_peak(self.device)
            side.step(batch)
            peak = None if before is None else (torch.cuda.max_memory_allocated() - before + side.held) / 1e9
            return True, peak
        except torch.OutOfMemoryError:
            pass  # Its traceback holds tensors: cleared below.
        side.clear()
        return False, None

    def _row(
        self,
        case: Case,
        batch: dict[str, Tensor],
        times: dict[str, list[float]],
        peaks: dict[str, float | None],
        busy: dict[str, float | None],
    ) -> dict[str, Any]:
        mask = batch.get("attention_mask")
        split = partition_tokens(batch["labels"].cpu(), None if mask is None else mask.cpu())
        labels, length = int((batch["labels"] != -100).sum()), min(case.rows or case.pair.length, case.tokens)
        whole = self.flops.executed(split.tokens, 0, length, labels)
        executed = self.flops.executed(split.dense.numel(), split.context.numel(), length, labels)
        medians = {name: statistics.median(values) if values else None for name, values in times.items()}
        dense, sparse = medians["dense"], medians["sparse"]
        speedup, ideal = dense / sparse if dense and sparse else None, whole / executed
        return {
            "pair": case.pair.name,
            "layers": f"{case.pair.layers} of {self.shape.layers}",
            "tokens": case.tokens,
            "batch": case.batch,
            "context": round(split.context.numel() / (split.context.numel() + split.dense.numel()), 4),
            "checkpointing": case.checkpointing,
            "dense_ms": rounded(dense, 1e3),
            "sparse_ms": rounded(sparse, 1e3),
            "speedup": rounded(speedup),
            "ideal": rounded(ideal),
            "efficiency": rounded(speedup / ideal if speedup else None),
            "dense_busy_ms": rounded(busy.get("dense"), 1e3),
            "sparse_busy_ms": rounded(busy.get("sparse"), 1e3),
            "dense_tflops": rounded(whole / dense / 1e12 if dense else None),
            "dense_gb": rounded(peaks["dense"]),
            "sparse_gb": rounded(peaks["sparse"]),
            "out_of_memory": [name for name, value in medians.items() if value is None],
            "repeats": max(map(len, times.values())),
            "spread": rounded(
                max((max(v) - min(v)) / statistics.median(v) for v in times.values() if v) if dense else None
            ),
        }


def equal_memory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense with checkpointing against sparse without, where the second needs no more than the GPU has."""
    found = []
    for row in rows:
        same = [
            r
            for r in rows
            if r["checkpointing"] and all(r[k] == row[k] for k in ("pair", "layers", "tokens", "batch", "context"))
        ]
        if not row["checkpointing"] and same and same[0]["dense_ms"]:
            other = same[0]
            found.append(
                {
                    **{key: row[key] for key in ("pair", "layers", "tokens", "batch", "context")},
                    "dense_checkpointed_gb": other["dense_gb"],
                    "sparse_gb": row["sparse_gb"],
                    "speedup": rounded(other["dense_ms"] / row["sparse_ms"]) if row["sparse_ms"] else None,
                }
            )
    return found


def drop(models: Models | None) -> None:
    """Free a pair's memory."""
    if models is not None:
        for side in (models.dense, models.sparse):
            side.model, side.optimizer = nn.Module(), None
    forget_parts()
    free()
