"""Heartbeats: who is missing is named, once, whoever notices; who lives is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sparselora_dist.process import SaidElsewhere
from sparselora_dist.sync import heartbeat as module
from sparselora_dist.sync.errors import RankLostError
from sparselora_dist.sync.heartbeat import Heartbeat

TIMEOUT = 1.2
PATIENCE = 60.0
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


class Job:
    """Ranks of this process, and what they would have said and done."""

    def __init__(self) -> None:
        self.store: Any = dist.HashStore()
        self.said: list[str] = []
        self.ended = threading.Event()
        self.beats: list[Heartbeat] = []

    def connect(self) -> Any:
        if self.store is None:
            raise dist.DistNetworkError("connection refused")
        return self.store

    def rank(self, number: int, size: int = 2, timeout: float = TIMEOUT) -> Heartbeat:
        beat = Heartbeat(number, size, timeout, lambda: self.connect(), "here:1").start()
        self.beats.append(beat)
        return beat

    def meet(self) -> None:
        """Until the ranks have read each other."""
        for beat in self.beats:
            wait(lambda beat=beat: len(beat._peers) == len(self.beats) - 1)  # type: ignore[misc]


def wait(until: Callable[[], Any]) -> None:
    gate = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if until():
            return
        gate.wait(0.02)
    raise AssertionError("did not come about")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Job]:
    job = Job()

    def leave(status: int) -> None:
        assert status == 1
        for beat in job.beats:
            beat._stopping.set()  # The process's threads end with it.
        job.ended.set()

    monkeypatch.setattr(module, "leave", leave)
    monkeypatch.setattr(module, "complain", job.said.append)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    yield job
    for beat in job.beats:
        beat.stop()


def silence(beat: Heartbeat) -> None:
    """As if the process had been stopped."""
    beat._stopping.set()
    beat._wake.set()
    for thread in beat._threads:
        thread.join(PATIENCE)


def test_a_silent_rank_is_named_and_the_process_is_ended(job: Job) -> None:
    one, two = job.rank(0), job.rank(1)
    two.at("backward of step 7")
    one.remedy = lambda: "the newest checkpoint is x"
    job.meet()
    wait(lambda: one._peers[1].phase == "backward of step 7")
    silence(two)
    assert job.ended.wait(PATIENCE)
    (text,) = job.said
    host = module.socket.gethostname()
    assert text.startswith(f"rank 1 ({host}, process {os.getpid()}) has not been heard of for ")
    assert "last seen in backward of step 7" in text and text.endswith("\nthe newest checkpoint is x")


def test_a_rank_that_is_through_is_not_missed(job: Job) -> None:
    one, two = job.rank(0), job.rank(1)
    job.meet()
    two.stop()
    assert not job.ended.wait(3 * TIMEOUT)
    assert one._verdict is None and not job.said


def test_ranks_that_live_are_left_alone(job: Job) -> None:
    """Also one whose main thread does nothing for much longer than the timeout."""
    for number in range(3):
        job.rank(number, 3)
    job.meet()
    assert not job.ended.wait(3 * TIMEOUT) and not job.said


def test_a_process_that_was_killed_is_seen_before_its_silence_is_long(job: Job) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    one = job.rank(0, timeout=3600)
    beat = [1, "evaluation at step 3", "b", module.place(), process.pid, module.born(process.pid)]
    job.store.set("1", module.json.dumps(beat))
    wait(lambda: one._peers)
    assert not job.said
    process.kill()
    process.wait()
    assert job.ended.wait(PATIENCE)
    assert job.said[0].startswith(f"rank 1 (b, process {process.pid}) is gone without a word")
    assert "last seen in evaluation at step 3" in job.said[0]


def test_the_backends_words_become_the_missing_rank(job: Job) -> None:
    one, two = job.rank(0), job.rank(1)
    job.meet()
    silence(two)
    with pytest.raises(RankLostError, match=r"rank 1 .* has not been heard of for .* last seen in starting"):
        one.explain(BROKEN)
    assert not job.said  # Whoever called says it.


def test_an_own_error_is_said_by_its_rank_alone(job: Job) -> None:
    one, two = job.rank(0), job.rank(1)
    job.meet()
    two.at("optimizer of step 2")
    two.explain(MemoryError("out of memory"))  # Returns: this rank says it.
    with pytest.raises(SaidElsewhere):
        one.explain(BROKEN)
    with pytest.raises(SaidElsewhere):
        one.explain(ValueError("the same, found here too"))
    assert one._words(one._verdict).startswith("rank 1 (") and "failed: out of memory" in one._words(one._verdict)


def test_a_rank_that_waits_is_ended_when_another_has_failed(job: Job) -> None:
    job.rank(0)
    two = job.rank(1)
    job.meet()
    two.explain(MemoryError("out of memory"))
    assert job.ended.wait(PATIENCE)
    assert not job.said  # Rank 1 has said it, on the same host.


def test_where_everyone_answers_they_are_said_to(job: Job) -> None:
    one, two = job.rank(0), job.rank(1)
    job.meet()
    two.at("saving of checkpoint-4")
    wait(lambda: one._peers[1].phase == "saving of checkpoint-4")
    with pytest.raises(RankLostError) as error:
        one.explain(BROKEN)
    assert "Connection closed by peer" in str(error.value)
    assert f"rank 1 ({module.socket.gethostname()}, process {os.getpid()}) answers, in saving of checkpoint-4" in str(
        error.value
    )


def test_a_store_out_of_reach_is_an_answer(job: Job) -> None:
    job.rank(1)
    wait(lambda: job.beats[0]._count > 1)
    job.store = None
    job.beats[0]._connect = job.connect
    # The connection that it has breaks too.
    job.beats[0]._exchange = lambda _: (_ for _ in ()).throw(dist.DistNetworkError("broken pipe"))  # type: ignore
    assert job.ended.wait(PATIENCE)
    assert job.said[0].startswith("the job's store at here:1 has not answered rank 1")
    assert "the host of rank 0, or the network to it, is gone" in job.said[0]


def test_one_process_of_a_host_speaks_and_old_marks_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    old, other = tmp_path / "sparselora-said-old", tmp_path / "sparselora-said-other"
    for path in (old, other):
        path.touch()
    os.utime(old, (0, 0))
    assert [module.first_of_host("here:1") for _ in range(2)] == [True, False]
    assert not old.exists() and other.exists() and len(list(tmp_path.iterdir())) == 2


def test_one_rank_or_no_timeout_does_nothing() -> None:
    for beat in (Heartbeat(), Heartbeat(0, 2, 0.0, dist.HashStore), Heartbeat(0, 1, 5.0, dist.HashStore)):
        assert not beat.start().active
        beat.explain(BROKEN)
        beat.stop()
