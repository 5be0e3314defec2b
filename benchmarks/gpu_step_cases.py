"""Which training steps benchmarks/gpu.py times, in which order, until its time is up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_models import has
from gpu_report import Budget, Report
from gpu_steps import Case, Models, Pair, drop, equal_memory
from shapes import SHAPES

LENGTH = 2048
CHECK_TOKENS = 2048
REPEAT_SECONDS = 1.5
SHORT = 512
"""Most tokens of a row of instructions, in padded and packed batches."""


def step_cases(layers: int, dtype: torch.dtype, *, tiny: bool = False) -> Iterator[Case]:
    """All cases, the most important first."""

    def pair(shape: str, storage: str, setting: str, layers: int = layers) -> Pair:
        return Pair(
            shape=shape, layers=layers, storage=storage, setting=setting, dtype=dtype, length=32 if tiny else LENGTH
        )

    def cases(
        pair: Pair, *sizes: tuple[int, float], batch: str = "full", rows: int | None = None, only: bool | None = None
    ) -> Iterator[Case]:
        """With and without checkpointing, or ``only`` one of them."""
        for tokens, context in sizes:
            for checkpointing in (True, False) if only is None else (only,):
                yield Case(
                    pair=pair, tokens=tokens, context=context, checkpointing=checkpointing, batch=batch, rows=rows
                )

    if tiny:
        for storage in ("plain", "nf4"):
            yield from cases(pair("tiny", storage, "math"), (128, 0.75))
        yield from cases(pair("tiny", "plain", "commonsense"), (64, 1.0))
        for batch in ("padded", "packed"):
            yield from cases(pair("tiny", "plain", "math"), (64, 0.75), batch=batch, rows=16)
        return
    main = [(shape, storage, "math") for storage in ("plain", "nf4") for shape in ("8b", "70b")]
    other = [(shape, storage, "commonsense") for storage in ("plain", "nf4") for shape in ("8b", "70b")]
    # How the stack compares with the whole model, which fits with 8B.
    whole = pair("8b", "plain", "math", layers=32)
    yield Case(pair=whole, tokens=8192, context=0.75, checkpointing=True)
    first, *others = main
    yield from cases(pair(*first), (8192, 0.75), (16384, 0.75), (2048, 0.75))
    yield from cases(pair(*first), (8192, 0.25), (8192, 0.5), (8192, 1.0), only=True)
    yield from cases(pair(*first), (8192, 0.75), batch="packed", rows=SHORT)
    others.reverse()  # 70B in NF4 before all.
    for some in others:
        yield from cases(pair(*some), (8192, 0.75))
    yield from cases(pair(*first), (1024, 0.75))
    yield from cases(pair(*first), (2048, 0.75), batch="packed", rows=SHORT)
    yield from cases(pair(*first), (8192, 0.75), (2048, 0.75), batch="padded", rows=SHORT)
    for some in others:
        yield from cases(pair(*some), (2048, 0.75), (1024, 0.75), (16384, 0.75))
    for some in others:
        yield from cases(pair(*some), (8192, 1.0), (8192, 0.5))
    yield from cases(pair(*first), (8192, 1.0), (8192, 0.5), only=False)
    for some in other:
        yield from cases(pair(*some), (8192, 0.75), (8192, 1.0))
    for some in others:
        for batch in ("packed", "padded"):
            yield from cases(pair(*some), (8192, 0.75), (2048, 0.75), batch=batch, rows=SHORT)
    for some in main:
        yield from cases(pair(*some), (2048, 1.0), (2048, 0.5), (16384, 1.0), (16384, 0.5))
    for some in other:
        yield from cases(pair(*some), (8192, 0.5), (2048, 0.75), (2048, 1.0), (2048, 0.5))
        yield from cases(pair(*some), (16384, 0.75), (16384, 1.0), (16384, 0.5))


def time_steps(report: Report, cases: list[Case], budget: Budget, device: torch.device) -> None:
    """Rows of ``steps``, and of ``gradients`` before the first of a pair. Cases of one pair follow each other where they are
    equally important, so that its models are built once. What is left out is a row too."""
    models: Models | None = None
    right: dict[Pair, bool] = {}
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case.pair.storage == "nf4" and not has("bitsandbytes"):
            report.leave_out("steps", case.name, "bitsandbytes is not installed")
            continue
        work = SHAPES[case.pair.shape].hidden ** 2 * case.pair.layers * case.tokens
        work *= 1.35 if case.checkpointing else 1.0
        if not budget.allows(work):
            report.leave_out("steps", case.name, "no time left")
            continue
        try:
            if models is None or models.pair != case.pair:
                drop(models)
                models = None
                models = Models(case.pair, device)
            if case.pair not in right:
                models.sparse.checkpointing(False)
                found = models.check(min(case.tokens, CHECK_TOKENS), 0.75)
                right[case.pair] = found.pop("right")
                report.judge("gradients", found, f"gradients of {case.pair.name}", right[case.pair])
            started = time.monotonic()
            row = models.measure(case, REPEAT_SECONDS if device.type == "cuda" else 0.0)
        except torch.OutOfMemoryError:
            # The models themselves do not fit.
            drop(models)
            models = None
            report.leave_out("steps", case.name, "out of memory")
            continue
        budget.took(work, time.monotonic() - started)
        rows.append({**row, "right": right[case.pair]})
        report.add("steps", rows[-1])
    drop(models)
    for row in equal_memory(rows):
        report.add("equal memory: dense with checkpointing, sparse without", row)
