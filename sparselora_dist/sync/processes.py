"""What the kernel says of the other processes of this host, and which of them speaks for all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
import time
from pathlib import Path

from ..launchers import boot_id

_STARTED = time.time()
_DAY = 86400.0


def place() -> str:
    """The kernel and the process numbers that this process and another must share for its number to mean anything."""
    try:
        if boot := boot_id():
            return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        pass
    return f"unknown/{socket.gethostname()}/{os.getpid()}"


def _stat(pid: int) -> list[str]:
    """State, parent and so on of a process, [] without it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def parent(pid: int) -> int | None:
    """The process that started it, or took its place; ``None`` where nothing is known of it."""
    fields = _stat(pid)
    return int(fields[1]) if len(fields) > 1 else None


def born(pid: int) -> int:
    """When a process began, in the kernel's ticks; tells it from a later one of the same number."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def is_gone(pid: int, began: int, where: str) -> bool:
    """Whether a process has ended; False of one elsewhere, of which nothing is known."""
    if where != place():
        return False
    fields = _stat(pid)
    return not fields or fields[0] in "ZX" or int(fields[19]) != began


def is_stopped(pid: int, where: str) -> bool:
    """Whether a process of this host is stopped, and not by a debugger."""
    return where == place() and _stat(pid)[:1] == ["T"]


def first_of_host(job: str) -> bool:
    """Whether this process is the first of its host to ask, by a file that all of them can see.

    Args:
        job: tells the jobs of a host apart that run at one time.
    """
    key = hashlib.sha256(f"{job} {os.getuid()}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"sparselora-said-{key}"
    for _ in range(2):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            _sweep(path.parent)
            return True
        except FileExistsError:
            try:
                if path.stat().st_mtime >= _STARTED:
                    return False
                path.unlink()  # Of a job before this one.
            except OSError:
                return False
        except OSError:
            return True
    return False


def _sweep(folder: Path) -> None:
    """Take away what jobs of other days have left for :func:`first_of_host`."""
    for path in folder.glob("sparselora-said-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
