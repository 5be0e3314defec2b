"""What the GPU path does on a GPU: right or wrong, against the hardware's limits, and in whole training steps and runs.

    python benchmarks/gpu.py --budget 540 --rows runs/gpu.jsonl --markdown runs/gpu.md
    python benchmarks/gpu.py --parts steps --only "8b bf16 math"
    python benchmarks/gpu.py --memory-70b

The most valuable part first; each can be asked for alone, and has a share of the time that is left:

    kernels    every kernel against its plain formula
    gradients  of small models, against the masked dense step; a step without a wait for the device
    profile    one dense and one sparse step: the kernels that take the most time, the share in which the GPU idles
    steps      training steps of Llama-3-8B and -70B shapes against dense PEFT LoRA, most important first: bf16 and NF4, with
               and without checkpointing, 1 to 16 thousand tokens, full, padded and packed batches
    graphs     the same as a CUDA graph: what the host's part of a step is
    train      launch/train.py on single, fsdp2 and zero3 at one rank, its losses against a run on the CPU; --model and
               --data add a model beside the demo's, --at-once N runs N of them side by side
    liger      plain PEFT with all of Liger, which is what people use today
    ops        every operation against its roofline, and the indexed products against the vendor's; what they reach goes
               into the file of rates by which launchers choose (sparselora_kernels.rates)

Every row is appended to --rows as soon as it is measured. A failed tolerance is a row and a name at the end, never an exit;
the status is then 1. What is not installed (liger-kernel, bitsandbytes, deepspeed) is left out and said so. ``--tiny`` runs
everything on a CPU, the kernels in Triton's interpreter, with shapes that say nothing about speed.

Where nothing can be installed, two links make the packages importable:

    mkdir -p build/gpu
    ln -sfn "$PWD/sparselora_dist" build/gpu/sparselora_dist
    ln -sfn "$PWD/kernels" build/gpu/sparselora_kernels
    PYTHONPATH=build/gpu python benchmarks/gpu.py

docs/performance.md says what else to carry there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from gpu_report import Budget, Report

PARTS = {
    "kernels": 3.0,
    "gradients": 1.0,
    "profile": 1.0,
    "steps": 5.0,
    "graphs": 2.0,
    "train": 3.0,
    "liger": 1.0,
    "ops": 2.0,
}
"""Each part, in order, and its weight: it may take that share of the weights still to come from what is left. ``kernels``
and ``gradients`` end when they are done."""
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "deepspeed", "numpy")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="stop in time (default 540)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="step cases whose name has this in it")
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of a stack (default 8); 32 or 80 is the whole model"
    )
    parser.add_argument("--model", metavar="FOLDER", help="a model for the part train, beside the demo's")
    parser.add_argument("--data", metavar="FILE", help="rows to train it on")
    parser.add_argument("--traces", metavar="FOLDER", help="Chrome traces of the part profile")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs of the part train side by side (1)")
    parser.add_argument(
        "--memory-70b", action="store_true", help="peak memory of a whole 70B-shaped NF4 model, nothing else"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of --memory-70b (default 4096)")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--rows", metavar="FILE", default="runs/gpu.jsonl", help="append rows here (runs/gpu.jsonl)")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    for name in ("model", "data"):  # Runs start in the repository's root.
        if getattr(arguments, name):
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    return arguments


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_part(part: str, report: Report, budget: Budget, device: torch.device, given: argparse.Namespace) -> None:
    """One part; each imports what it needs, so that one that cannot be imported leaves the others."""
    dtype = torch.float32 if given.tiny else torch.bfloat16
    layers = 3 if given.tiny else given.layers
    if part == "kernels":
        from gpu_check import check_kernels

        check_kernels(report, device, given.tiny)
    elif part == "gradients":
        from gpu_check import check_small, check_waits, check_wide

        check_small(report, "tiny" if given.tiny else "small", 3, device)
        if device.type == "cuda":
            check_waits(report, device)
            check_wide(report, device)
    elif part == "profile":
        from gpu_profile import profile_steps

        _use_liger(report, device)
        profile_steps(report, device, given.tiny, layers, budget, given.traces)
    elif part == "steps":
        from gpu_step_cases import step_cases, time_steps

        _use_liger(report, device)
        cases = [case for case in step_cases(layers, dtype, tiny=given.tiny) if given.only in case.name]
        time_steps(report, cases, budget, device)
    elif part == "graphs":
        if device.type != "cuda":
            report.leave_out("graphs", "CUDA graphs", "they need a GPU")
            return
        from gpu_graphs import time_graphs

        _use_liger(report, device, loss=False)  # Liger's loss waits for the number of labels.
        time_graphs(report, budget, layers, device)
    elif part == "train":
        from gpu_train import time_runs

        time_runs(report, budget, tiny=given.tiny, folder=given.model, data=given.data, at_once=given.at_once)
    elif part == "liger":
        if device.type != "cuda" or report.about["liger-kernel"] == "not installed":
            why = "liger-kernel is not installed" if device.type == "cuda" else "Liger's kernels need a GPU"
            report.leave_out("liger", "plain PEFT + Liger", why)
            return
        from gpu_liger import run_liger

        run_liger(report, layers, budget.left)
    else:
        from gpu_ops import time_ops
        from gpu_rates import save

        rows = []
        for row in time_ops(device, tiny=given.tiny, seconds=budget.left):
            report.add("ops", row)
            rows.append(row)
        if file := save(rows, device):
            report.add("rates", {"what": f"launchers choose by the rates in {file} from now on"})


def _use_liger(report: Report, device: torch.device, *, loss: bool = True) -> None:
    """Liger's norm, RoPE and ``loss`` on both sides of every step from here on, where it is installed; said in a row."""
    liger = report.about["liger-kernel"] != "not installed" and device.type == "cuda"
    if liger:
        from sparselora_dist.apply.liger import use_liger

        use_liger("llama", cross_entropy=loss)
    parts = "RMS norm, RoPE and loss" if loss else "RMS norm and RoPE"
    report.add("steps use", {"what": f"{'Liger' if liger else 'Transformers'}'s {parts} on both sides"})


def run_memory(report: Report, device: torch.device, given: argparse.Namespace) -> None:
    from gpu_memory import measure_memory

    name, layers, tokens = ("tiny", 3, 128) if given.tiny else ("70b", 80, given.tokens)
    dtype = torch.float32 if given.tiny else torch.bfloat16
    length = min(2048, tokens // 2)
    for row in measure_memory(name, layers, tokens=tokens, length=length, context=0.75, device=device, dtype=dtype):
        report.add("memory", row)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Before any kernel is imported.
    elif not torch.cuda.is_available():
        print("error: there is no GPU here; --tiny runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.tiny else "cuda")
    budget = Budget(given.budget)
    report = Report(environment(device), given.rows, given.markdown)
    if given.memory_70b:
        run_memory(report, device, given)
        report.write()
        return 0
    wanted = [part for part in PARTS if part in given.parts]
    for number, part in enumerate(wanted):
        weight = PARTS[part] / sum(PARTS[name] for name in wanted[number:])
        try:
            run_part(part, report, budget.share(weight), device, given)
        except Exception as problem:  # The other parts have answers of their own.
            report.judge("parts", {"part": part, "problem": repr(problem)}, f"part {part}: {problem!r}", False)
        report.write()
    print(f"{len(report.wrong)} wrong" + "".join(f"\n  {what}" for what in report.wrong))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
