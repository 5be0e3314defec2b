"""The rates that a run of benchmarks/gpu.py measured, in a file that launchers choose by (``sparselora_kernels.rates``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparselora_kernels import rates


def measured(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best that any row of an operation's table reached, by the rate that it measures."""
    best: dict[str, float] = {}
    for row in rows:
        if name := row.get("rate"):
            best[name] = max(best.get(name, 0.0), row["reached"])
    return best


def save(rows: Iterable[dict[str, Any]], device: torch.device) -> Path | None:
    """Write the file of this device, where there is a GPU or a place is named; the path, or ``None``."""
    if device.type != "cuda" and rates.VARIABLE not in os.environ:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = rates.path_of(name)
    rates.write(file, name, measured(rows))
    return file
