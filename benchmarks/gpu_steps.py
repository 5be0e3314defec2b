"""Whole training steps for benchmarks/gpu.py: SparseLoRA against dense PEFT LoRA, checked before they are timed.

FLOPs (``ideal``, ``dense_tflops``) are those of the step without the recomputation of activation checkpointing. ``dense_gb``
and ``sparse_gb`` are the peaks that each side would have alone: both models are on the device, and what belongs to the
other is taken off.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from gpu_models import SETTINGS, autocast, forget_parts, has, held_bytes, make_pair, plain_copy, sparse_state
from shapes import SHAPES
from torch import Tensor, nn

from sparselora_dist import selection
from sparselora_dist.families import base_linear, causal_lm, decoder_layers, geometry
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.train.metrics import flop_model

TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.25, 0.05)}
"""Of a gradient's norm: the worst matrix, and all of them together. bf16 against fp32 is 4 % and 2 % apart in 32 layers of
hidden 512, by rounding alone; a wrong channel shows in fp32."""
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

    @property
    def name(self) -> str:
        kind = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.pair.name}, {self.pair.layers} layers, {self.tokens} tokens, context {self.context:.0%}, {kind}"


class Side:
    """One of the two models, and what takes a step of it."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward; the loss."""
        with autocast(self.device, self.dtype):
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: dict[str, Tensor]) -> None:
        self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def clear(self) -> None:
        """After an error: nothing of the step is left."""
        self.optimizer.zero_grad(set_to_none=True)
        free()

    @property
    def held(self) -> int:
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return held_bytes(self.model) + sum(t.nbytes for t in state)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_batch(vocabulary: int, tokens: int, length: int, context: float, device: torch.device) -> dict[str, Tensor]:
    """Full rows without padding. A share ``context`` of each has no label and precedes none; one label a row at least."""
    length = min(length, tokens)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (tokens // length, length), generator=generator)
    labels = ids.clone()
    labels[:, : min(round(context * length) + 1, length - 1)] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


# --- correctness ----------------------------------------------------------------------------------------------------


def check_step(dense: Side, sparse: Side, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Difference between the gradients of the sparse step and of the dense step in which the dropped channels are set to
    zero, relative to their norm: of the worst matrix, and of all. ``dense`` has the weights and adapters of ``sparse``."""
    sparse.gradients(batch)
    with _dropped(dense.model, selection(sparse.model), partition_tokens(batch["labels"].cpu()).context):
        dense.gradients(batch)
    got = {name: p.grad for name, p in sparse.model.named_parameters() if p.requires_grad}
    apart: list[tuple[float, float]] = []
    for name, parameter in dense.model.named_parameters():
        if parameter.requires_grad:
            want, have = parameter.grad, got[name]
            missing = want is None or have is None
            apart.append((math.inf, 1.0) if missing else ((want - have).norm().item(), want.norm().item()))
    dense.clear(), sparse.clear()
    if not all(math.isfinite(value) for pair in apart for value in pair):
        return math.inf, math.inf
    worst = max(difference / max(norm, 1e-12) for difference, norm in apart)
    return worst, math.hypot(*(d for d, _ in apart)) / math.hypot(*(n for _, n in apart))


@contextmanager
def _dropped(model: Any, kept: dict[int, dict[str, Tensor]], context: Tensor) -> Iterator[None]:
    """Set to zero, for the ``context`` rows, what the channels outside ``kept`` give."""
    heads, handles = geometry(model), []
    # Base and branch as one operation would pass by the base's own hooks.
    fused = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    for layer in decoder_layers(model):
        chosen = kept.get(layer.index, {})
        projections: Any = layer.attention
        if "ffn" in chosen:
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(_before(chosen["ffn"], context)))
        if "qk" in chosen:
            for name, rows in (("q_proj", heads.q_rows(chosen["qk"])), ("k_proj", heads.k_rows(chosen["qk"]))):
                handles.append(base_linear(getattr(projections, name)).register_forward_hook(_after(rows, context)))
        if "vo" in chosen:
            rows, columns = heads.v_rows(chosen["vo"]), heads.o_columns(chosen["vo"])
            handles.append(base_linear(projections.v_proj).register_forward_hook(_after(rows, context)))
            handles.append(base_linear(projections.o_proj).register_forward_pre_hook(_before(columns, context)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in fused.items():
            module.__dict__["forward"] = forward


def _masked(x: Tensor, kept: Tensor, context: Tensor) -> Tensor:
    tokens = x.shape[:-1].numel()
    if context.numel() and context[-1] >= tokens:
        return x  # Rows that carry a label, packed: all of them are dense.
    keep = torch.ones(tokens, x.shape[-1], dtype=x.dtype)
    keep[context] = 0
    keep[context[:, None], kept.cpu()] = 1
    return x * keep.to(x.device).view_as(x)


def _before(kept: Tensor, context: Tensor) -> Any:
    return lambda module, args: (_masked(args[0], kept, context), *args[1:])


def _after(kept: Tensor, context: Tensor) -> Any:
    return lambda module, args, output: _masked(output, kept, context)


def check_small(shape: str, layers: int, device: torch.device) -> list[dict[str, Any]]:
    """Gradients of small models, in fp32 and bf16, plain and NF4, with and without checkpointing; raises on a wrong one."""
    rows = []
    for storage in ("plain", "nf4") if has("bitsandbytes") else ("plain",):
        for dtype in (torch.float32, torch.bfloat16):
            pair = Pair(shape=shape, layers=layers, storage=storage, setting="math", dtype=dtype, length=64)
            models = Models(pair, device)
            for checkpointing in (False, True):
                models.sparse.checkpointing(checkpointing)
                error = models.check(tokens=192, context=0.75)[0]
                kind = str(dtype).removeprefix("torch.")
                rows.append({"what": pair.name, "dtype": kind, "checkpointing": checkpointing, "error": error})
            forget_parts()
    return rows


def check_no_host_wait(side: Side, batch: dict[str, Tensor], set_mode: Callable[[str], None]) -> None:
    """Run a step in which every wait for the device is an error, from the first decoder layer to the end of backward.

    ``set_mode`` is ``torch.cuda.set_sync_debug_mode``. Before the first layer the labels are split, which waits once, and
    Transformers looks at its mask.
    """
    first = decoder_layers(side.model)[0].module
    handle = first.register_forward_pre_hook(lambda *_: set_mode("error"))
    try:
        side.gradients(batch)
    finally:
        set_mode("default")
        handle.remove()
        side.clear()


# --- timing ---------------------------------------------------------------------------------------------------------


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

    def batch(self, tokens: int, context: float) -> dict[str, Tensor]:
        return make_batch(self.vocabulary, tokens, self.pair.length, context, self.device)

    def check(self, tokens: int, context: float) -> tuple[float, float]:
        """See :func:`check_step`.

        Raises:
            SystemExit: the gradients differ.
        """
        pair, reference = self.pair, self.dense
        if pair.storage != "plain":  # bitsandbytes quantises down and o in the other direction.
            options: dict[str, Any] = {"device": self.device, "dtype": pair.dtype, "length": pair.length}
            reference = Side(plain_copy(self.sparse.model, self.shape, **options), self.device, pair.dtype)
        worst, overall = check_step(reference, self.sparse, self.batch(tokens, context))
        most = TOLERANCE[pair.dtype]
        if not (worst <= most[0] and overall <= most[1]):
            raise SystemExit(
                f"wrong gradients, {pair.name}: the sparse step differs from the masked dense step by {worst:.2g} in one "
                f"matrix, {overall:.2g} in all (allowed {most[0]:g} and {most[1]:g}): no timing"
            )
        return worst, overall

    def measure(self, case: Case, seconds: float) -> dict[str, Any]:
        """One row; about ``seconds`` of repeats, three at least."""
        batch = self.batch(case.tokens, case.context)
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
        while alive and (len(next(iter(times[name] for name in alive))) < 3 or time.perf_counter() - started < seconds):
            for name, side in alive.items():
                times[name].append(timed(lambda side=side: side.step(batch), self.device))
        return self._row(case, batch, times, peaks)

    def _warm_up(self, side: Side, batch: dict[str, Tensor]) -> tuple[bool, float | None]:
        """Whether a step fits, and the peak of memory that this side alone needs, in GB."""
        try:
            for _ in range(WARM_UP):
                free()
                side.step(batch)
                before = _start_peak(self.device)
            side.step(batch)
            peak = None if before is None else (torch.cuda.max_memory_allocated() - before + side.held) / 1e9
            return True, peak
        except torch.OutOfMemoryError:
            pass  # Its traceback holds tensors: cleared below.
        side.clear()
        return False, None

    def _row(
        self, case: Case, batch: dict[str, Tensor], times: dict[str, list[float]], peaks: dict[str, float | None]
    ) -> dict[str, Any]:
        split = partition_tokens(batch["labels"].cpu())
        labels, length = int((batch["labels"] != -100).sum()), min(case.pair.length, case.tokens)
        whole = self.flops.executed(split.tokens, 0, length, labels)
        executed = self.flops.executed(split.dense.numel(), split.context.numel(), length, labels)
        medians = {name: statistics.median(values) if values else None for name, values in times.items()}
        dense, sparse = medians["dense"], medians["sparse"]
        speedup, ideal = dense / sparse if dense and sparse else None, whole / executed
        return {
            "pair": case.pair.name,
            "layers": f"{case.pair.layers} of {self.shape.layers}",
            "tokens": case.tokens,
            "context": round(split.context.numel() / split.tokens, 4),
            "checkpointing": case.checkpointing,
            "dense_ms": _round(dense, 1e3),
            "sparse_ms": _round(sparse, 1e3),
            "speedup": _round(speedup),
            "ideal": _round(ideal),
            "efficiency": _round(speedup / ideal if speedup else None),
            "dense_tflops": _round(whole / dense / 1e12 if dense else None),
            "dense_gb": _round(peaks["dense"]),
            "sparse_gb": _round(peaks["sparse"]),
            "out_of_memory": [name for name, value in medians.items() if value is None],
            "repeats": max(map(len, times.values())),
            "spread": _round(
                max((max(v) - min(v)) / statistics.median(v) for v in times.values() if v) if dense else None
            ),
        }


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, by the device's own clock where it has one."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _start_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _round(value: float | None, scale: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * scale:.4g}")


def equal_memory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense with checkpointing against sparse without, where the second needs no more than the GPU has."""
    found = []
    for row in rows:
        same = [
            r
            for r in rows
            if r["checkpointing"] and all(r[k] == row[k] for k in ("pair", "layers", "tokens", "context"))
        ]
        if not row["checkpointing"] and same and same[0]["dense_ms"]:
            other = same[0]
            found.append(
                {
                    **{key: row[key] for key in ("pair", "layers", "tokens", "context")},
                    "dense_checkpointed_gb": other["dense_gb"],
                    "sparse_gb": row["sparse_gb"],
                    "speedup": _round(other["dense_ms"] / row["sparse_ms"]) if row["sparse_ms"] else None,
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
