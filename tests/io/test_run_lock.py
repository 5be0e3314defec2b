"""One run a folder: refused while the other lives, wherever it runs, and never after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.config import ConfigError
from sparselora_dist.io import run_lock
from sparselora_dist.io.run_lock import RunLock

HOLDER = """
import sys
from pathlib import Path
from sparselora_dist.io.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        words = rf"'train.output_dir' is {tmp_path}, where process {holder.pid} on \S+, started 0 min ago, is writing"
        with pytest.raises(ConfigError, match=words):
            RunLock.take(tmp_path)
        holder.send_signal(signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / run_lock.NAME).is_file()  # What it said is still there; the lock is not.
    lock = RunLock.take(tmp_path)
    assert json.loads((tmp_path / run_lock.NAME).read_text())["process"] == os.getpid()
    lock.close()
    assert not list(tmp_path.iterdir())


def test_within_one_process_as_well(tmp_path: Path) -> None:
    first = RunLock.take(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on"):
        RunLock.take(tmp_path)
    first.close()
    RunLock.take(tmp_path).close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a run on another host said, where the file system's locks do not reach from host to host."""
    monkeypatch.setattr(run_lock, "PATIENCE", 2.0)
    said = {"host": "node-b", "kernel": "another", "process": 7, "since": time.time() - 600, "beat": "000000000003"}
    (tmp_path / run_lock.NAME).write_text(json.dumps(said))
    return said


def test_a_host_that_still_beats(tmp_path: Path, elsewhere: dict[str, Any]) -> None:
    def beat() -> None:
        (tmp_path / run_lock.NAME).write_text(json.dumps(elsewhere | {"beat": "000000000004"}))

    timer = threading.Timer(0.3, beat)
    timer.start()
    with pytest.raises(ConfigError, match=r"process 7 on node-b, started 10 min ago, is writing"):
        RunLock.take(tmp_path)
    timer.join()


def test_a_host_that_is_gone(tmp_path: Path, elsewhere: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    RunLock.take(tmp_path).close()
    assert "was left by process 7 on node-b: waiting up to 2 s for a sign of life" in caplog.text


def test_where_there_are_no_locks_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beat alone decides."""

    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)
    first = RunLock.take(tmp_path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on"):
        RunLock.take(tmp_path)
    first.close()
    RunLock.take(tmp_path).close()
