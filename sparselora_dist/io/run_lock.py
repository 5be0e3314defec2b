"""One run an output folder: a lock that ends with the process that holds it, however it ends.

The kernel's advisory lock on ``.lock`` is the lock; what the file says (host, process, since when) is for the message, and
for file systems whose locks do not reach other hosts. There the holder's beat decides: a number in the file that grows as
long as the holder lives. It is watched for a while, so that no two hosts' clocks are compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..launchers import boot_id

log = logging.getLogger(__name__)

NAME = ".lock"
BEAT = 5.0
"""Seconds between two beats."""
PATIENCE = 20.0
"""Seconds without a beat after which a holder on another host counts as dead."""


class RunLock:
    """Held from :meth:`take` until :meth:`close`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._over = threading.Event()
        self._said = {"host": socket.gethostname(), "kernel": _kernel(), "process": os.getpid(), "since": time.time()}
        self._write(0)
        self._thread = threading.Thread(target=self._beats, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """Of a folder that exists.

        Raises:
            ConfigError: another run holds it; its host and process are named.
        """
        path = folder / NAME
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                alone = _lock(descriptor)
                # A holder that ends removes the file: then this lock is on a file that no one will find.
                if alone is not None and not _is_still(path, descriptor):
                    os.close(descriptor)
                    continue
                said = _read(path)
                if alone is None:
                    raise _held(folder, said)
                # This kernel's lock says enough of a holder under the same kernel.
                if said and not (alone and said.get("kernel") == _kernel()) and _beats_on(path, said):
                    raise _held(folder, said)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise
            return cls(path, descriptor)

    def close(self) -> None:
        """Give it up; the file goes first, while nobody else can have it."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def _beats(self) -> None:
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            self._write(number)

    def _write(self, beat: int) -> None:
        with contextlib.suppress(OSError):  # A full disk is said where something is saved.
            line = json.dumps({**self._said, "beat": f"{beat:012d}"}).encode()  # As long every time.
            os.pwrite(self._descriptor, line, 0)
            os.ftruncate(self._descriptor, len(line))
            os.fsync(self._descriptor)


def _lock(descriptor: int) -> bool | None:
    """True: locked. None: somebody else has it. False: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return None
    except OSError:
        return False


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Opened anew: what another host wrote is seen then."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _beats_on(path: Path, said: dict[str, Any]) -> bool:
    """Whether what the file says changes while it is watched."""
    log.warning(
        "%s was left by process %s on %s: waiting up to %.0f s for a sign of life",
        *(path, said.get("process"), said.get("host"), PATIENCE),
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _read(path) != said:
            return True
    return False


def _held(folder: Path, said: dict[str, Any]) -> ConfigError:
    who = "another run"
    if said:
        minutes = max(0.0, time.time() - float(said.get("since", time.time()))) / 60
        who = f"process {said.get('process')} on {said.get('host')}, started {minutes:.0f} min ago,"
    return ConfigError(
        f"'train.output_dir' is {folder}, where {who} is writing: two runs in one folder would mix their rows and replace "
        "each other's checkpoints. End that one, or name another folder"
    )


def _kernel() -> str:
    """Which kernel's locks these are: two containers of a host share one, two hosts of the same name do not."""
    return boot_id() or socket.gethostname()
