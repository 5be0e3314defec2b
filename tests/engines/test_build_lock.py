"""A lock that a killed build of DeepSpeed's operators has left is named; one that is held is waited for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from sparselora_dist.engines import build_lock
from sparselora_dist.engines.build_lock import wait_for_builds


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    return path


def test_one_that_nobody_holds_is_named(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (0, time.time() - 60))
    with pytest.raises(RuntimeError, match=f"{lock} was left by a build .* Delete the file"):
        wait_for_builds(shared=False)
    lock.unlink()
    wait_for_builds(shared=False)


def test_one_that_a_process_holds_is_waited_for(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "_SAY_AFTER", 0.0)
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    os.utime(lock, (0, 0))  # However old.

    def release() -> None:
        lock.unlink()
        os.close(held)

    threading.Timer(0.3, release).start()
    wait_for_builds(shared=False)
    assert not lock.exists()
    assert f"waiting for another process to build DeepSpeed's operator ({lock})" in caplog.text


def test_one_of_another_host_is_given_the_time_that_a_build_takes(lock: Path) -> None:
    """Its processes cannot be seen from here."""
    lock.touch()
    os.utime(lock, (0, time.time() - 60))
    threading.Timer(0.3, lock.unlink).start()
    wait_for_builds(shared=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 3600))
    with pytest.raises(RuntimeError, match="3600 s ago"):
        wait_for_builds(shared=True)
