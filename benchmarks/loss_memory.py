"""How much memory do LM head and cross-entropy take, whole and in chunks?

    python benchmarks/loss_memory.py [--labels 2048] [--vocabulary 128256] [--hidden 1024] [--json]

Forward and backward of the loss down to the gradient of the hidden states: Transformers' loss of whole logits, and ours.
First compares the two at a smaller size. Then each runs in a process of its own, whose peak memory is read from the
system: what it grew by, above weight, hidden states and labels. Also prints the bytes that the planner counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from sparselora_dist.io.memory import trim_heap
from sparselora_kernels import chunk_rows, label_loss, row_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("whole", "chunked")


def made(labels: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.empty(labels, hidden, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(vocabulary, hidden, dtype=dtype)
    for part in weight.split(1024):  # What filling it takes would hide what the loss takes.
        part.normal_(std=hidden**-0.5)
    return states, weight, torch.randint(vocabulary, (labels,))


def loss(way: str, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if way == "chunked":
        return label_loss(states, weight, None, labels) / len(labels)
    logits = torch.nn.functional.linear(states, weight).unsqueeze(0)
    return ForCausalLMLoss(logits, None, weight.shape[0], len(labels), shift_labels=labels.unsqueeze(0))


def check(dtype: torch.dtype) -> None:
    """Stops unless the losses are equal, and our gradient is as near to the exact one as that of whole logits."""
    losses, errors = [], []
    states, weight, labels = made(1000, 20000, 64, dtype)
    exact = states.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.double().t(), labels).backward()
    for way in WAYS:
        value = loss(way, states, weight, labels)
        (grad,) = torch.autograd.grad(value, states)
        losses.append(value.detach())
        errors.append(float((grad - exact.grad).abs().max()))
    if not torch.allclose(*losses, rtol=1e-6, atol=0.0) or errors[1] > 2 * errors[0]:
        raise SystemExit(f"{dtype}: the loss in chunks is not the loss")


def peak_bytes() -> int:
    """Of this program; ``getrusage`` would begin with what the process held that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process."""
    dtype = DTYPES[options.dtype]
    loss(way, *made(64, 512, 64, dtype)).backward()  # What libraries allocate once.
    given = made(options.labels, options.vocabulary, options.hidden, dtype)
    trim_heap()
    before, started = peak_bytes(), time.perf_counter()
    loss(way, *given).backward()
    return {"bytes": peak_bytes() - before, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("labels", 2048), ("vocabulary", 128256), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return print(json.dumps(measure(options.way, options)))
    rows: dict[str, dict[str, Any]] = {}
    for name, dtype in DTYPES.items():
        check(dtype)
        row: dict[str, Any] = {}
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--way", way, "--dtype", name]
            row[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        chunk = min(options.labels, chunk_rows(options.vocabulary, dtype))
        row["chunk"] = chunk * options.vocabulary * row_bytes(dtype)
        row["gradient"] = options.labels * options.hidden * dtype.itemsize
        rows[name] = row
    if options.json:
        return print(json.dumps(rows))
    print("| dtype | whole, MB | chunked, MB | one chunk | gradient of the hidden states | whole, s | chunked, s |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        sizes = [row["whole"]["bytes"], row["chunked"]["bytes"], row["chunk"], row["gradient"]]
        seconds = [row[way]["seconds"] for way in WAYS]
        print(f"| {name} | {' | '.join([f'{x / 1e6:.0f}' for x in sizes] + [f'{x:.1f}' for x in seconds])} |")


if __name__ == "__main__":
    main()
