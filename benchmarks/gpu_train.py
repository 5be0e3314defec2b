"""Whole runs of launch/train.py on one GPU, for benchmarks/gpu.py: do all engines learn what the CPU learns, and how fast?

Every run is a process: ``single``, and ``zero3`` (where deepspeed is installed) and ``fsdp2`` at one rank under NCCL. The
reference is the same run on this machine's CPU under ``single``, with the same rows, in the same call. Several run at once
where ``--at-once`` says so: most of a short run is starting and compiling. Their speed is then not told.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_models import has
from gpu_report import Budget, Report

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
# Of the loss, at the worst step. fp32: another order of summation, over STEPS updates, and a channel that changes at a tie.
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2, "nf4": 5e-2}
ENGINES = ("single", "fsdp2", "zero3")
ROW_TOKENS = 128
"""About the tokens of a demo row, from which batches of so many thousand tokens are made."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs between runs beside the engine."""

    dtype: str = "float32"
    nf4: bool = False
    checkpointing: bool = False
    packing: bool | None = None
    rows: int = 16

    @property
    def name(self) -> str:
        parts = ["nf4" if self.nf4 else self.dtype, f"{self.rows} rows"]
        if self.checkpointing:
            parts.append("checkpointing")
        if self.packing is not None:
            parts.append("packed" if self.packing else "padded")
        return ", ".join(parts)

    @property
    def tolerance(self) -> float:
        return TOLERANCE["nf4" if self.nf4 else self.dtype]

    def overrides(self) -> list[str]:
        words = ["--model.dtype", self.dtype, "--train.per_device_train_batch_size", str(self.rows)]
        words += ["--train.gradient_checkpointing", str(self.checkpointing).lower()]
        if self.nf4:
            words += ["--quantization.load_in_4bit", "true", "--quantization.bnb_4bit_quant_type", "nf4"]
        if self.packing is not None:
            words += ["--data.packing", str(self.packing).lower()]
        return words


def variants(tiny: bool) -> Iterator[Variant]:
    """The most important first."""
    yield Variant(rows=2 if tiny else 16)
    if tiny:
        return
    yield Variant(dtype="bfloat16", nf4=True, checkpointing=True)
    yield Variant(dtype="bfloat16", packing=True)
    yield Variant(dtype="bfloat16", checkpointing=True)
    yield Variant(dtype="bfloat16", packing=False)
    yield Variant(dtype="bfloat16", nf4=True)
    for thousand in (1, 8, 16):  # The variants above are of 2.
        yield Variant(dtype="bfloat16", rows=max(1, thousand * 1024 // ROW_TOKENS))


def model_overrides(folder: str | None, data: str | None) -> list[str]:
    """The demo's model and rows, or those of a folder: 8 layers, such as base-9m."""
    if folder is None:
        return []
    layers = {"ffn": {"1-6": 0.9}, "qk": {"2-6": 0.5}, "vo": {"2-6": 0.5}}
    words = ["--model.name_or_path", folder, "--sparse_lora.layers", json.dumps(layers)]
    return words + (["--data.train", data] if data else [])


def run(
    engine: str, words: list[str], cpu: bool, seconds: float, threads: str | None = None
) -> tuple[dict[str, Any], list[float]]:
    """One run: a row of what it took or why it failed, and its losses by step; ``threads`` of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "launch" / "train.py"), "--config", f"configs/{engine}_sparse.json"),
            *("--train.output_dir", folder, "--train.max_steps", str(STEPS), "--train.disable_tqdm", "true"),
            *("--data.eval", "null", "--train.save_steps", str(STEPS), *words),
        ]
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if threads is not None:
            env["OMP_NUM_THREADS"] = threads
        if cpu:
            env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        started = time.monotonic()
        log = Path(folder) / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | str = process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"no time left after {seconds:.0f} s"
        rows = _metrics(Path(folder) / "metrics.jsonl")
        speeds = [row["tokens_per_second_per_gpu"] for row in rows[STEPS // 3 :] if "tokens_per_second_per_gpu" in row]
        row = {
            "seconds": time.monotonic() - started,
            "tokens/s": statistics.median(speeds) if speeds else None,
            "problem": "" if status == 0 else _reason(status, log),
        }
        return row, [row["loss"] for row in rows]


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def _reason(status: int | str, log: Path) -> str:
    """The error of a run that failed: its last line that says one, or its end."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and "Traceback" not in line]
    return f"{status}: {(errors or lines or ['nothing was said'])[-1][:300]}"


def apart(reference: list[float], losses: list[float]) -> float:
    """The largest relative difference of two runs' losses; infinite where they have not the same steps."""
    if not reference or len(reference) != len(losses):
        return float("inf")
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(reference, losses))


def _unable(engine: str, variant: Variant) -> str:
    """Why an engine cannot run a variant here; empty if it can."""
    if engine == "zero3" and not has("deepspeed"):
        return "deepspeed is not installed"
    if engine == "fsdp2" and variant.nf4 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        return "FSDP2 shards NF4 from torch 2.12 on"
    return ""


def time_runs(
    report: Report, budget: Budget, *, tiny: bool, folder: str | None = None, data: str | None = None, at_once: int = 1
) -> None:
    """Rows of ``runs``: the CPU's first, then every engine's, of every variant, until the time is up."""
    threads = str(max(1, (os.cpu_count() or 1) // at_once)) if at_once > 1 else None
    with ThreadPoolExecutor(at_once) as pool:
        started = [
            (variant, model, _start(pool, report, budget, variant, model, data, tiny, threads))
            for variant in variants(tiny)
            for model in dict.fromkeys((None, folder))
        ]
        for variant, model, runs in started:
            _judge(report, variant, _name(variant, model), runs, alone=at_once == 1)


Ran = tuple[dict[str, Any], list[float]] | None
"""Of :func:`run`; None where no time was left."""


def _name(variant: Variant, folder: str | None) -> str:
    return f"{Path(folder).name if folder else 'demo'}, {variant.name}"


def _start(
    pool: ThreadPoolExecutor,
    report: Report,
    budget: Budget,
    variant: Variant,
    folder: str | None,
    data: str | None,
    tiny: bool,
    threads: str | None,
) -> list[tuple[str, bool, Future[Ran]]]:
    """Engine, whether on the CPU, and what will come of it; the reference first."""
    if variant.nf4 and not has("bitsandbytes"):
        report.leave_out("train", _name(variant, folder), "bitsandbytes is not installed")
        return []
    words = [*model_overrides(folder, data), *variant.overrides()]

    def one(engine: str, cpu: bool) -> Ran:
        if not budget.allows(1.0):
            return None
        found = run(engine, words, cpu, budget.left, threads)
        budget.took(1.0, found[0]["seconds"])
        return found

    runs = []
    for engine, cpu in (("single", True), *((engine, tiny) for engine in ENGINES)):
        if why := _unable(engine, variant):
            report.leave_out("train", f"{_name(variant, folder)}, {engine}", why)
            continue
        runs.append((engine, cpu, pool.submit(one, engine, cpu)))
    return runs


def _judge(report: Report, variant: Variant, name: str, runs: list[tuple[str, bool, Future[Ran]]], alone: bool) -> None:
    reference: list[float] | None = None
    for engine, cpu, future in runs:
        found = future.result()
        if found is None:
            report.leave_out("train", f"{name}, {engine}", "no time left")
            continue
        row, losses = found
        if not alone:
            row.pop("tokens/s", None)
        told = {"what": name, "engine": engine, "on": "CPU" if cpu else "GPU", **row}
        told["last loss"] = losses[-1] if losses else None
        if reference is None and cpu:
            reference = losses
            report.judge("runs", told, f"{name} on the CPU: {row['problem']}", not row["problem"])
            continue
        difference = apart(reference or [], losses)
        told |= {"loss apart": difference, "allowed": variant.tolerance}
        right = not row["problem"] and difference <= variant.tolerance
        report.judge("runs", told, f"{name}, {engine}: {row['problem'] or f'loss apart {difference:.2g}'}", right)
