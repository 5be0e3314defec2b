"""Right or wrong on the device, for benchmarks/gpu.py: every kernel, gradients of small models, a step without a wait."""

from __future__ import annotations

import os

import gpu_kernels
import torch
from gpu_correct import check_no_host_wait
from gpu_models import forget_parts, has
from gpu_report import Report
from gpu_steps import Models, Pair, drop

# That check kernels side by side, since compiling them takes most of the time.
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))


def check_kernels(report: Report, device: torch.device, tiny: bool) -> None:
    """Rows of wrong kernels by name, and of the sums of all."""
    rows = []
    for row in gpu_kernels.check_kernels(device, tiny=tiny, processes=1 if tiny else PROCESSES):
        rows.append(row)
        if row["problem"]:
            report.judge("wrong kernels", row, f"kernel {row['kernel']}: {row['problem']}", False)
    for row in gpu_kernels.summary(rows):
        report.add("kernels", row)


def check_small(report: Report, shape: str, layers: int, device: torch.device) -> None:
    """Gradients of small models, in fp32 and bf16, plain and NF4, with and without checkpointing."""
    for storage in ("plain", "nf4") if has("bitsandbytes") else ("plain",):
        for dtype in (torch.float32, torch.bfloat16):
            pair = Pair(shape=shape, layers=layers, storage=storage, setting="math", dtype=dtype, length=64)
            models = Models(pair, device)
            for checkpointing in (False, True):
                models.sparse.checkpointing(checkpointing)
                row = {**models.check(tokens=192, context=0.75), "checkpointing": checkpointing}
                right = row.pop("right")
                report.judge("gradients", row, f"gradients of {pair.name}, checkpointing {checkpointing}", right)
            forget_parts()


def check_wide(report: Report, device: torch.device) -> None:
    """Gradients at the widths of Llama-3-8B in fp32, where a wrong channel cannot hide in rounding."""
    for storage in ("plain", "nf4") if has("bitsandbytes") else ("plain",):
        pair = Pair(shape="8b", layers=4, storage=storage, setting="math", dtype=torch.float32, length=512)
        models = Models(pair, device)
        row = models.check(tokens=1024, context=0.75)
        right = row.pop("right")
        report.judge("gradients", row, f"gradients of {pair.name}", right)
        drop(models)


def check_waits(report: Report, device: torch.device) -> None:
    for storage in ("plain", "nf4") if has("bitsandbytes") else ("plain",):
        pair = Pair(shape="small", layers=3, storage=storage, setting="math", dtype=torch.bfloat16, length=256)
        models = Models(pair, device)
        batch = models.batch(1024, 0.75)
        models.sparse.gradients(batch), models.sparse.clear()  # Compiles, which may wait.
        problem = ""
        try:
            check_no_host_wait(models.sparse, batch, torch.cuda.set_sync_debug_mode)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        report.judge("waits", {"what": pair.name, "problem": problem}, f"a wait in {pair.name}", not problem)
        drop(models)
