"""The lock under which torch builds DeepSpeed's operators: one that a killed build has left is waited for without end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
# What DeepSpeed may build for a run of ours.
_OPERATORS = ("deepspeed_shm_comm", "deepspeed_ccl_comm", "cpu_adam", "fused_adam", "cpu_adagrad", "cpu_lion")
# Longer than any of these takes to build; on another host, whose processes cannot be seen, a build may hold the lock.
_LONGEST_BUILD = 600.0
_SAY_AFTER, _LOOK = 5.0, 0.5


def wait_for_builds(shared: bool) -> None:
    """Return once no lock is in the way.

    Args:
        shared: whether ranks on other hosts may build in the same folder.

    Raises:
        RuntimeError: a lock that nobody holds; the file is named.
    """
    began, said = time.monotonic(), False
    while lock := next(_locks(), None):
        if not _is_open(lock):
            try:
                age = time.time() - lock.stat().st_mtime
            except OSError:
                continue  # The build has just ended.
            if age > (_LONGEST_BUILD if shared else _LOOK):
                raise RuntimeError(
                    f"{lock} was left by a build of DeepSpeed's operators that was killed ({age:.0f} s ago): no process "
                    "holds it, and ZeRO-3 would wait for it without end. Delete the file and start again"
                )
        if not said and time.monotonic() - began > _SAY_AFTER:
            said = True
            log.warning("waiting for another process to build DeepSpeed's operator (%s)", lock)
        time.sleep(_LOOK)


def _locks() -> Iterator[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    for folder in [Path(root)] if root else Path(get_default_build_root()).glob("*"):
        yield from (lock for name in _OPERATORS if (lock := folder / name / "lock").exists())


def _is_open(path: Path) -> bool:
    """Whether a process of this host, as far as it can be seen, has the file open, as torch's builds keep their lock."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.samefile(entry, path) for entry in descriptors.iterdir() if _names(entry, path)):
                return True
        except OSError:
            continue  # Another user's, or gone.
    return False


def _names(entry: Path, path: Path) -> bool:
    try:
        return os.path.basename(os.readlink(entry)) == path.name
    except OSError:
        return False
