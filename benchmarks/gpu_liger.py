"""How fast is what people use today? Plain PEFT LoRA with all of Liger (norm, RoPE, SwiGLU, fused linear cross-entropy).

    python benchmarks/gpu_liger.py --shape 8b --layers 8 --length 2048 --tokens 8192,2048 --seconds 60

A process of its own, since Liger replaces Transformers' classes for the whole process. One JSON row a line, as it comes.
Nothing of this package is in these models: not its exact savings, not its operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from gpu_models import build
from gpu_profile import busy_seconds
from gpu_report import Report
from gpu_sides import Side, make_batch
from gpu_timing import free, no_collection, rounded, start_peak, timed
from shapes import SHAPES, stack

CONTEXT = 0.75


def patch_all() -> None:
    """All that Liger offers a Llama."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True
    )


def measure(
    shape: str, layers: int, length: int, tokens: list[int], device: torch.device, dtype: torch.dtype, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for every size, with and without checkpointing, until ``seconds`` are over."""
    end = time.monotonic() + seconds
    side = Side(build(SHAPES[shape], layers, "plain", device=device, dtype=dtype, length=length), device, dtype)
    vocabulary = stack(SHAPES[shape], layers).vocabulary
    for count in tokens:
        batch = make_batch(vocabulary, count, length, CONTEXT, device)
        for checkpointing in (True, False):
            row = {
                "shape": shape,
                "layers": layers,
                "tokens": count,
                "context": CONTEXT,
                "checkpointing": checkpointing,
            }
            if time.monotonic() > end:
                yield {**row, "ms": None, "gb": None, "why": "no time left"}
                continue
            side.checkpointing(checkpointing)
            yield row | _time(side, batch, device)


def _time(side: Side, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    try:
        for _ in range(2):
            free()
            side.step(batch)
        start_peak(device)
        with no_collection():
            times = [timed(lambda: side.step(batch), device) for _ in range(7 if device.type == "cuda" else 1)]
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        busy = busy_seconds(side, batch, device)
        return {
            "ms": rounded(statistics.median(times), 1e3),
            "busy_ms": rounded(busy, 1e3),
            "gb": rounded(peak),
            "why": "",
        }
    except torch.OutOfMemoryError:
        pass
    side.clear()
    return {"ms": None, "gb": None, "why": "out of memory"}


def run_liger(report: Report, layers: int, seconds: float) -> None:
    """For benchmarks/gpu.py: this script in a process of its own, its rows into the table ``PEFT + Liger``."""
    command = [sys.executable, str(Path(__file__)), "--layers", str(layers), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                report.add("PEFT + Liger", json.loads(line))
    if process.returncode:
        report.leave_out("liger", " ".join(command[1:]), f"ended with status {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", default="8192,2048,1024,16384")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    patch_all()
    sizes = [int(size) for size in given.tokens.split(",")]
    device = torch.device("cuda")
    for row in measure(given.shape, given.layers, given.length, sizes, device, torch.bfloat16, given.seconds):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
