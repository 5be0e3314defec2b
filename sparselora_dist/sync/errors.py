"""Errors that come of another rank, and how to tell them from a rank's own."""

from __future__ import annotations

import torch.distributed as dist

# How the backends say that the other side is not there. Whatever else is raised is a rank's own error.
_BACKEND_WORDS = (
    "gloo", "nccl", "c10d", "tcpstore", "connection closed", "connection reset", "connection refused", "broken pipe",
    "timed out", "mask synchronisation failed", "another rank", "process group",
)  # fmt: skip


class RankLostError(ConnectionError):
    """Another rank is gone, silent, or has failed; it is named."""


def is_derived(error: BaseException) -> bool:
    """Whether the backend speaks of another rank, here or in what the error was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(word in str(seen).lower() for word in _BACKEND_WORDS):
            return True
        seen = seen.__cause__
    return False
