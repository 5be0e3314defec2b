"""A process that has imported what ranks import and forks them: importing takes longer than what most of them run.

A line on its standard input is a rank, as JSON; it answers with the rank's process id. Ranks with an even and with an odd
number come from different servers, so that they hash strings, and thus order sets, differently, as ranks of a launcher do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any

IMPORTS = ("deepspeed", "datasets", "sparselora_dist.train", "support.engine_workers")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_RANK += ("PYTEST_CURRENT_TEST",)
"""What a server's own environment need not share with its ranks'; the rest may matter to what it has imported."""


class Rank:
    """A process that a server has forked, which is nobody's child here."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = None  # It has ended already.

    def ended(self, timeout: float) -> bool:
        """Whether it ends within so many seconds."""
        return self._fd is None or bool(select.select([self._fd], [], [], timeout)[0])

    def close(self) -> None:
        """End it, if it has not ended by itself."""
        if self._fd is not None:
            if not self.ended(0):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)
                self.ended(60)
            os.close(self._fd)
            self._fd = None


class Server:
    """Forks ranks that begin with ``environment``, whatever their own numbers."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.rank_server"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self, **rank: Any) -> Rank:
        """Fork a rank: the arguments of :func:`_become`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(rank) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise AssertionError(f"the server of ranks ended:\n{self._log.read().decode(errors='replace')[-4000:]}")
        return Rank(int(answer))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


_servers: dict[int, Server] = {}


def start_rank(folder: str, environment: dict[str, str], log: Path) -> Rank:
    """Run :func:`support.harness.work_as_rank` on ``folder`` in a process of its own, with this environment alone."""
    half = int(environment["RANK"]) % 2
    shared = {name: value for name, value in environment.items() if name not in OF_A_RANK}
    if half in _servers and _servers[half].environment != shared:
        _servers.pop(half).close()
    if half not in _servers:
        _servers[half] = Server(shared)
    return _servers[half].start(folder=folder, environment=environment, log=str(log), cwd=os.getcwd())


@atexit.register
def _close_all() -> None:
    while _servers:
        _servers.popitem()[1].close()


def _become(folder: str, environment: dict[str, str], log: str, cwd: str) -> None:
    """What a process that begins anew would have."""
    import numpy

    from support.harness import work_as_rank

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for target in (1, 2):
        os.dup2(output, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    numpy.random.seed()
    work_as_rank(Path(folder))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the imports say is no answer.
    gc.disable()  # It would look through all modules again and again while they are imported.
    for name in IMPORTS:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Ranks that have ended leave no zombies.
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, file=answers, flush=True)
            continue
        try:
            _become(**json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
