"""How much memory there is, how much was used, and the refusal where it is too little."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


class InsufficientMemoryError(ValueError):
    """What this rank must keep does not fit in its memory."""


def free_bytes(device: torch.device, local_ranks: int) -> int:
    """Free memory for one rank: of its GPU, or its part of the host's (the container's limit included)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            # What files left in the cache counts as used, and is given up when asked for.
            statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            cache = int(statistics["inactive_file"]) + int(statistics["active_file"])
            free = min(free, int(limit) - int((_CGROUP / "memory.current").read_text()) + cache)
    except (OSError, ValueError, KeyError):
        pass
    return free // local_ranks


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """Highest (host, device) memory of this process so far."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def trim_heap() -> None:
    """Give freed memory back to the system: between the tensors that are kept, glibc would keep the holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_fits(needed: int, device: torch.device, local_ranks: int, rank: int) -> None:
    """Refuse before anything is read.

    Raises:
        InsufficientMemoryError: ``needed`` bytes are not free.
    """
    free = free_bytes(device, local_ranks)
    if needed > free:
        raise InsufficientMemoryError(
            f"rank {rank} would keep {needed / 1e9:.2f} GB of frozen weights on {device}, where {free / 1e9:.2f} GB are "
            "free: use more ranks, or quantization.load_in_4bit true (fewer bits: docs/formats.md); 'sparselora-dist "
            "plan' shows what fits"
        )
