"""What would a step take if the host cost nothing? Forward and backward replayed as a CUDA graph, for benchmarks/gpu.py.

A graph holds the shapes that it was captured with, the numbers of dense and of context tokens among them, so a run cannot
use one as it is: this part shows the GPU's own time, on both sides.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from gpu_report import Budget, Report
from gpu_sides import Side
from gpu_steps import Models, Pair, drop
from gpu_timing import free, rounded, timed

from sparselora_dist.method.tokens import partition_tokens

REPEATS = 10


def time_graphs(report: Report, budget: Budget, layers: int, device: torch.device) -> None:
    """Rows of ``graphs``: 8B in bf16 and 70B in NF4, 1 to 8 thousand tokens."""
    for shape, storage, sizes in (("8b", "plain", (8192, 2048, 1024)), ("70b", "nf4", (8192, 2048))):
        models = Models(
            Pair(shape=shape, layers=layers, storage=storage, setting="math", dtype=torch.bfloat16, length=2048), device
        )
        for tokens in sizes:
            for checkpointing in (True, False):
                if budget.left <= 0:
                    what = f"{models.pair.name}, {tokens} tokens, checkpointing {checkpointing}"
                    report.leave_out("graphs", what, "no time left")
                    continue
                report.add("graphs", _row(models, tokens, checkpointing))
        drop(models)


def _row(models: Models, tokens: int, checkpointing: bool) -> dict[str, Any]:
    batch = models.batch(tokens, 0.75)
    times: dict[str, float | None] = {}
    problem = ""
    for name, side in (("dense", models.dense), ("sparse", models.sparse)):
        side.checkpointing(checkpointing)
        try:
            times[name] = replayed(side, batch)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # What cannot be captured is an answer too.
            times[name], problem = None, f"{name}: {str(error).splitlines()[0]}"
        side.clear()
    split = partition_tokens(batch["labels"].cpu())
    labels, length = int((batch["labels"] != -100).sum()), min(models.pair.length, tokens)
    whole = models.flops.executed(split.tokens, 0, length, labels)
    ideal = whole / models.flops.executed(split.dense.numel(), split.context.numel(), length, labels)
    dense, sparse = times["dense"], times["sparse"]
    speedup = dense / sparse if dense and sparse else None
    return {
        "pair": models.pair.name,
        "layers": models.pair.layers,
        "tokens": tokens,
        "checkpointing": checkpointing,
        "dense_ms": rounded(dense, 1e3),
        "sparse_ms": rounded(sparse, 1e3),
        "speedup": rounded(speedup),
        "ideal": rounded(ideal),
        "efficiency": rounded(speedup / ideal if speedup else None),
        "problem": problem,
    }


def replayed(side: Side, batch: dict[str, Any]) -> float:
    """Seconds of forward and backward as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            side.gradients(batch)
            side.optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    free()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        side.gradients(batch)
    graph.replay()
    times = [timed(graph.replay, side.device) for _ in range(REPEATS)]
    graph.reset()
    return statistics.median(times)
