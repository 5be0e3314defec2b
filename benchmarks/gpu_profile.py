"""Where does the time of a step go on a GPU? The kernels that take the most, and the share in which none runs.

One dense and one sparse step of Llama-3-8B shapes, for benchmarks/gpu.py. On a CPU the operators stand for kernels.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_report import Budget, Report
from torch.profiler import ProfilerActivity, profile

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
OPERATORS = ("cpu_op",)
TOP = 25
NAME = 90
"""Characters of a kernel's name that are shown."""


def profile_steps(
    report: Report, device: torch.device, tiny: bool, layers: int, budget: Budget, traces: str | None = None
) -> None:
    """Tables ``profile`` (one row a step) and ``top kernels`` (``TOP`` rows a step); whole Chrome traces into the folder
    ``traces``."""
    from gpu_steps import Models, Pair, drop  # Which measures how busy the device is by this module.

    dtype = torch.float32 if tiny else torch.bfloat16
    shape, length = ("tiny", 32) if tiny else ("8b", 2048)
    models = Models(
        Pair(shape=shape, layers=layers, storage="plain", setting="math", dtype=dtype, length=length), device
    )
    for tokens in (64,) if tiny else (8192, 2048):
        batch = models.batch(tokens, 0.75)
        for kind, side in (("dense", models.dense), ("sparse", models.sparse)):
            what = f"{models.pair.name}, {layers} layers, {tokens} tokens, checkpointing, {kind}"
            if budget.left <= 0:
                report.leave_out("profile", what, "no time left")
                continue
            side.checkpointing(True)
            for _ in range(3):
                side.step(batch)
            keep = Path(traces) / f"{kind}-{tokens}.json.gz" if traces else None
            events = trace(side, batch, device, keep)
            report.add("profile", {"what": what, **summary(events)})
            for row in top(events):
                report.add("top kernels", {"what": what, **row})
    drop(models)


def trace(side: Any, batch: dict[str, Any], device: torch.device, keep: Path | None = None) -> list[dict[str, Any]]:
    """What ran in one step: ``name``, ``ts`` and ``dur`` in µs; the whole trace, compressed, into ``keep``."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        side.step(batch)
        if gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        text = file.read_bytes()
    if keep:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_bytes(gzip.compress(text))
    events = json.loads(text)["traceEvents"]
    kinds = KERNELS if gpu else OPERATORS
    return [event for event in events if event.get("cat") in kinds and "dur" in event]


def busy_seconds(side: Any, batch: dict[str, Any], device: torch.device) -> float | None:
    """Seconds of one step in which a kernel runs; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    found = summary(trace(side, batch, device))
    return None if found["ms"] is None else found["ms"] * (1 - found["idle share"]) / 1e3


def summary(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """From the first kernel's start to the last one's end: how long, how many, and the share in which none runs."""
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events)
    if not spans:
        return {"ms": None, "launches": 0, "idle share": None}
    busy, end = 0.0, spans[0][0]
    for first, last in spans:  # Kernels of two streams may overlap.
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    whole = end - spans[0][0]
    return {"ms": whole / 1e3, "launches": len(spans), "idle share": 1 - busy / whole if whole else 0.0}


def top(events: Iterable[dict[str, Any]], count: int = TOP) -> list[dict[str, Any]]:
    """The kernels that take the most time, all launches of one name together."""
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += float(event["dur"])
        launches[event["name"]] += 1
    total = sum(times.values()) or 1.0
    return [
        {"kernel": name[:NAME], "launches": launches[name], "us": spent, "share": spent / total}
        for name, spent in times.most_common(count)
    ]
