"""What goes wrong with running processes: killed, stopped, out of memory, left alone by their launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.engines.ranks import free_port
from support.harness import ROOT

from .conftest import Tiny

PATIENCE = 240.0
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
HOST = re.escape(socket.gethostname())
KEYS = ("step", "loss", "grad_norm", "eval_loss")


@dataclass
class Started:
    """A launcher's process, and what it and its ranks have said."""

    process: subprocess.Popen
    log: Path
    config: str

    def ranks(self) -> list[int]:
        """The processes that still run with this run's file."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if self.config in words and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
        return found

    def end(self) -> str:
        """Wait until every process has ended; all that was said."""
        self.process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.ranks():
            assert time.monotonic() < deadline, f"{self.ranks()} still run:\n{self.text()[-3000:]}"
            time.sleep(0.1)
        return self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start a run with a fault in it; what is left of it is ended with the test."""
    started: list[Started] = []

    def begin(launcher: tuple[str, ...], fault: str, folder: Path, engine: str = "fsdp2", **train: Any) -> Started:
        # Where nobody is silent, a slow machine must not look like it.
        settings = {"save_steps": 3, "resume": "auto", "heartbeat_timeout": 24} | train
        # Several batches an evaluation, to be interrupted between.
        settings["per_device_eval_batch_size"] = 1
        data = {"packing": False}
        config = tiny.config_file(tmp_path / f"{len(started)}.json", engine, folder, data=data, train=settings)
        log = tmp_path / f"{len(started)}.log"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PATH": path}
        env |= {"FAULT": fault, "FAULT_ONCE": str(tmp_path / f"{len(started)}.once")}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)
        program = Path(sys.executable).parent / launcher[0]
        words = [str(program) if program.exists() else launcher[0], *launcher[1:]]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [*words, "benchmarks/fault_rank.py", "--config", config],
                cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        started.append(Started(process, log, config))
        return started[-1]

    yield begin
    for run in started:
        for pid in {run.process.pid, *run.ranks()}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


def wait(until: Callable[[], Any], run: Started) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline and run.process.poll() is None, run.text()[-3000:]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run that nothing happens to."""
    from support.harness import run_launch

    folder = tmp_path_factory.mktemp("whole")
    settings = {"save_steps": 3, "per_device_eval_batch_size": 1}
    config = tiny.config_file(folder / "run.json", "fsdp2", folder / "out", data={"packing": False}, train=settings)
    run_launch([*TORCHRUN, "launch/train.py", "--config", config])
    return folder / "out"


def test_torchrun_goes_on_by_itself_after_a_rank_was_killed(start: Callable, whole: Path, tmp_path: Path) -> None:
    run = start((*TORCHRUN, "--max-restarts", "2"), "kill 1 backward of step 5", tmp_path / "out")
    text = run.end()
    assert run.process.returncode == 0, text[-3000:]
    assert len(re.findall(rf"rank 1 \({HOST}, process \d+\) is gone without a word", text)) == 1, text
    assert f"the newest checkpoint is {tmp_path}/out/checkpoint-3" in text
    assert lines(tmp_path / "out") == lines(whole)


def test_a_stopped_rank_is_named_and_every_process_ends(start: Callable, tmp_path: Path) -> None:
    run = start(TORCHRUN, "stop 1 backward of step 4", tmp_path / "out", heartbeat_timeout=6)
    text = run.end()
    assert run.process.returncode != 0
    said = rf"error: rank 1 \({HOST}, process \d+\) has not been heard of for \d+ s and is stopped; last seen in "
    said += "backward of step 4"
    assert len(re.findall(said, text)) == 1, text
    # torchrun's summary, the last on the terminal, has it too.
    assert "has not been heard of" in text.rpartition("Root Cause")[2], text
    assert "gloo" not in text, text
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-3"]


def test_the_rank_that_keeps_the_store_is_named_too(start: Callable, tmp_path: Path) -> None:
    """Without torchrun rank 0 has the job's store: with it goes what the others would read. And nobody ends them."""
    job = f"WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}"
    ranks = f'for r in 0 1; do {job} RANK=$r LOCAL_RANK=$r python "$@" & done; wait'
    run = start(("bash", "-c", ranks, "bash"), "kill 0 optimizer of step 4", tmp_path / "out")
    text = run.end()
    assert re.search(rf"rank 0 \({HOST}, process \d+\) is gone without a word.*optimizer of step 4", text), text


def test_a_rank_without_memory_says_so_once(start: Callable, tmp_path: Path) -> None:
    run = start(TORCHRUN, "memory 1 evaluation at step 0", tmp_path / "out")
    text = run.end()
    assert run.process.returncode != 0
    assert text.count("torch.OutOfMemoryError: CUDA out of memory") == 1, text
    assert "(rank 1 failed)" in text and "(rank 0" not in text, text
    assert "out of memory" in text.rpartition("Root Cause")[2], text


def test_sigterm_in_an_evaluation_saves_and_resumes(start: Callable, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run = start(TORCHRUN, "slow all evaluation at step 6", folder, save_steps=None)
    wait(Path(f"{run.config.removesuffix('.json')}.once").exists, run)
    run.process.send_signal(signal.SIGTERM)
    text = run.end()
    assert text.count(f"saved checkpoint-6 in {folder}") == 1, text
    run = start(TORCHRUN, "none all never", folder)
    text = run.end()
    assert run.process.returncode == 0, text[-3000:]
    assert lines(folder) == lines(whole)


def test_ranks_end_when_their_launcher_is_gone(start: Callable, tmp_path: Path) -> None:
    """deepspeed's command leaves two processes behind that go on: the launcher proper, and the ranks."""
    folder = tmp_path / "out"
    words = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()))
    run = start(words, "none all never", folder, engine="zero3", max_steps=5000, save_steps=None)
    wait(lambda: (folder / "metrics.jsonl").is_file() and len(lines(folder)) >= 3, run)
    run.process.send_signal(signal.SIGTERM)
    text = run.end()
    (saved,) = folder.glob("checkpoint-*")
    assert text.count(f"SIGTERM: saved {saved.name} in {folder}") == 1, text
