"""Time and memory of one piece of work, for benchmarks/gpu.py."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

HIDE_CYCLES = 2_000_000
"""About a millisecond of a GPU's clock: longer than the host needs to launch an operation of a few kernels."""


def timed(work: Callable[[], Any], device: torch.device, *, hide: bool = False) -> float:
    """Seconds, by the device's own clock where it has one.

    Args:
        hide: put a kernel that sleeps in front, so that the host has launched everything before the clock starts. For an
            operation, which in a step follows others; not for a step, whose launches people wait for.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hide:
        torch.cuda._sleep(HIDE_CYCLES)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector waits while steps are timed, on every side."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free() -> None:
    """Give back what nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_peak(device: torch.device) -> int | None:
    """Bytes allocated now, from which the peak is counted anew; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def rounded(value: float | None, scale: float = 1.0) -> float | None:
    """Four digits of ``value * scale``."""
    return None if value is None else float(f"{value * scale:.4g}")
