"""What the GPU path does on a GPU: right or wrong, against the hardware's limits, and in whole training steps.

    python benchmarks/gpu.py --budget 540 --json gpu.json --markdown gpu.md
    python benchmarks/gpu.py --memory-70b

In this order, every part behind a green one:

    check   every kernel against its plain formula; gradients of small models; a step without a wait for the device
    ops     every operation against its roofline, and the indexed products against the vendor's; what they reach goes into
            the file of rates by which launchers choose (sparselora_kernels.rates)
    steps   training steps of Llama-3-8B and -70B shapes against dense PEFT LoRA, most important first, until the budget
            is used up; what is left out is named

A wrong result ends it with a non-zero status and no timing. liger-kernel (norm, RoPE and loss, for both sides alike) and
bitsandbytes (NF4, and the QLoRA baseline) are used where they are installed. ``--tiny`` runs everything on a CPU, the
kernels in Triton's interpreter, with shapes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

PARTS = ("check", "ops", "steps")
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel")
LENGTH = 2048
# That check kernels side by side, since compiling them takes most of the time.
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))
CHECK_TOKENS = 2048
REPEAT_SECONDS = 1.5
MARGIN_SECONDS = 10


class Budget:
    """Seconds that are left, and what the next piece of work may take, from what the last ones took."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._rate = 0.0

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, work: float) -> bool:
        """Whether ``work`` (in any unit, always the same) is likely to end in time."""
        return self.left > 1.3 * self._rate * work + MARGIN_SECONDS

    def took(self, work: float, seconds: float) -> None:
        self._rate = max(0.5 * self._rate, seconds / work)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="stop in time (default 540)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of check,ops,steps; check always runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="step cases whose name has this in it")
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of a stack (default 8); 32 or 80 is the whole model"
    )
    parser.add_argument(
        "--memory-70b", action="store_true", help="peak memory of a whole 70B-shaped NF4 model, nothing else"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of --memory-70b (default 4096)")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--json", metavar="FILE", help="write all rows")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {arguments.parts}: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    return arguments


def environment(device: torch.device) -> dict[str, str]:
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# --- the parts ------------------------------------------------------------------------------------------------------


def run_check(report: Report, device: torch.device, tiny: bool) -> None:
    import gpu_kernels
    import gpu_steps

    report.add("kernels", gpu_kernels.check_kernels(device, tiny=tiny, processes=1 if tiny else PROCESSES))
    report.add("gradients", gpu_steps.check_small("tiny" if tiny else "small", 3, device))
    if device.type == "cuda":
        for storage in ("plain", "nf4") if gpu_steps.has("bitsandbytes") else ("plain",):
            pair = gpu_steps.Pair(
                shape="small", layers=3, storage=storage, setting="math", dtype=torch.bfloat16, length=256
            )
            models = gpu_steps.Models(pair, device)
            batch = models.batch(1024, 0.75)
            models.sparse.gradients(batch), models.sparse.clear()  # Compiles, which may wait.
            gpu_steps.check_no_host_wait(models.sparse, batch, torch.cuda.set_sync_debug_mode)
            report.say(f"no wait for the device in a sparse forward and backward: {pair.name}")
            gpu_steps.drop(models)


def run_ops(report: Report, device: torch.device, tiny: bool, budget: Budget) -> None:
    import gpu_ops
    import gpu_rates

    report.add("ops", gpu_ops.time_ops(device, tiny=tiny, seconds=min(90.0, 0.25 * budget.left)))
    if file := gpu_rates.save(report.tables["ops"], device):
        report.say(f"launchers choose by the rates in {file} from now on")


def run_steps(report: Report, device: torch.device, cases: list[Any], budget: Budget) -> None:
    """Cases of one pair follow each other where they are equally important, so that its models are built once."""
    import gpu_steps
    from shapes import SHAPES

    models: gpu_steps.Models | None = None
    checked: set[gpu_steps.Pair] = set()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    report.tables["steps"] = rows  # Written with every row, so that a run that is cut off leaves what it has.
    for case in cases:
        if case.pair.storage == "nf4" and not gpu_steps.has("bitsandbytes"):
            left_out.append(f"{case.name}: bitsandbytes is not installed")
            continue
        work = SHAPES[case.pair.shape].hidden ** 2 * case.pair.layers * case.tokens
        work *= 1.35 if case.checkpointing else 1.0
        if not budget.allows(work):
            left_out.append(f"{case.name}: no time left")
            continue
        started = time.monotonic()
        if models is None or models.pair != case.pair:
            gpu_steps.drop(models)
            models = gpu_steps.Models(case.pair, device)
            if case.pair not in checked:
                models.sparse.checkpointing(False)
                worst, overall = models.check(min(case.tokens, CHECK_TOKENS), 0.75)
                report.say(f"{case.pair.name}: gradients {overall:.2g} from the masked dense step, {worst:.2g} at most")
                checked.add(case.pair)
            started = time.monotonic()
        rows.append(models.measure(case, REPEAT_SECONDS if device.type == "cuda" else 0.0))
        budget.took(work, time.monotonic() - started)
        report.say(json.dumps(rows[-1]))
        report.write()
    gpu_steps.drop(models)
    report.add("steps", rows)
    report.add("equal memory: dense with checkpointing, sparse without", gpu_steps.equal_memory(rows))
    report.add("left out", [{"what": name} for name in left_out])


def step_cases(layers: int, dtype: torch.dtype, *, tiny: bool = False) -> Iterator[Any]:
    """All cases, the most important first."""
    from gpu_steps import Case, Pair

    def pair(shape: str, storage: str, setting: str, layers: int = layers) -> Pair:
        return Pair(
            shape=shape, layers=layers, storage=storage, setting=setting, dtype=dtype, length=32 if tiny else LENGTH
        )

    def cases(pair: Pair, *sizes: tuple[int, float]) -> Iterator[Case]:
        for tokens, context in sizes:
            for checkpointing in (True, False):
                yield Case(pair=pair, tokens=tokens, context=context, checkpointing=checkpointing)

    if tiny:
        for storage in ("plain", "nf4"):
            yield from cases(pair("tiny", storage, "math"), (128, 0.75))
        yield from cases(pair("tiny", "plain", "commonsense"), (64, 1.0))
        return
    main = [(shape, storage, "math") for storage in ("plain", "nf4") for shape in ("8b", "70b")]
    other = [(shape, storage, "commonsense") for storage in ("plain", "nf4") for shape in ("8b", "70b")]
    # How the stack compares with the whole model, which fits with 8B.
    whole = pair("8b", "plain", "math", layers=32)
    yield Case(pair=whole, tokens=8192, context=0.75, checkpointing=True)
    for some in main:
        yield from cases(pair(*some), (8192, 0.75))
    for some in main:
        yield from cases(pair(*some), (8192, 1.0), (8192, 0.5), (2048, 0.75), (16384, 0.75))
    for some in other:
        yield from cases(pair(*some), (8192, 0.75), (8192, 1.0))
    for some in main:
        yield from cases(pair(*some), (2048, 1.0), (2048, 0.5), (16384, 1.0), (16384, 0.5))
    for some in other:
        yield from cases(pair(*some), (8192, 0.5), (2048, 0.75), (2048, 1.0), (2048, 0.5))
        yield from cases(pair(*some), (16384, 0.75), (16384, 1.0), (16384, 0.5))


# --- output ---------------------------------------------------------------------------------------------------------


class Report:
    """Tables of rows: printed as they come, written at the end or when it is cut off."""

    def __init__(self, about: dict[str, Any], json_file: str | None, markdown_file: str | None) -> None:
        self.about, self.tables = about, {}
        self._json, self._markdown = json_file, markdown_file
        self.say(json.dumps(about))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.tables[name] = rows
        self.say(table(name, rows))
        self.write()

    def write(self) -> None:
        if self._json:
            Path(self._json).write_text(json.dumps({"about": self.about, "tables": self.tables}, indent=1))
        if self._markdown:
            text = "\n".join(table(name, rows) for name, rows in self.tables.items())
            Path(self._markdown).write_text(f"{json.dumps(self.about)}\n{text}")


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown; the columns are those of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"\n## {name}\n"]
    if columns:
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Before any kernel is imported.
    elif not torch.cuda.is_available():
        print("error: there is no GPU here; --tiny runs on a CPU", file=sys.stderr)
        return 2
    device, dtype = (
        torch.device("cpu" if arguments.tiny else "cuda"),
        torch.float32 if arguments.tiny else torch.bfloat16,
    )
    budget = Budget(arguments.budget)
    about: dict[str, Any] = environment(device)
    liger = about["liger-kernel"] != "not installed" and device.type == "cuda"
    about["steps use"] = f"{'Liger' if liger else 'Transformers'}'s RMS norm, RoPE and loss on both sides"
    report = Report(about, arguments.json, arguments.markdown)
    if arguments.memory_70b:
        from gpu_memory import measure_memory

        name, layers, tokens = ("tiny", 3, 128) if arguments.tiny else ("70b", 80, arguments.tokens)
        length = min(LENGTH, tokens // 2)
        rows = measure_memory(name, layers, tokens=tokens, length=length, context=0.75, device=device, dtype=dtype)
        report.add("memory", rows)
        return 0
    run_check(report, device, arguments.tiny)
    parts = arguments.parts.split(",")
    if "ops" in parts:
        run_ops(report, device, arguments.tiny, budget)
    if "steps" in parts:
        if liger:  # Not before: its loss waits for the device, which the check of the sparse path does not allow.
            from sparselora_dist.apply.liger import use_liger

            use_liger("llama", cross_entropy=True)
        cases = list(step_cases(3 if arguments.tiny else arguments.layers, dtype, tiny=arguments.tiny))
        run_steps(report, device, [case for case in cases if arguments.only in case.name], budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
