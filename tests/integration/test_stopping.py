"""Told to stop, or failing, in one process: what is saved, what is said, and that the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist.config.run import RunConfig
from sparselora_dist.engines.torch_state import TorchStateEngine
from sparselora_dist.sync.heartbeat import Heartbeat
from sparselora_dist.train import run, saving
from sparselora_dist.train.stopping import Stopped

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("alone")
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
KEYS = ("step", "loss", "grad_norm", "eval_loss")


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in KEYS if key in row} for row in rows]


@pytest.fixture(autouse=True)
def _hangs_up() -> Iterator[None]:
    """Also where the tests run under ``nohup``, which a run respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def trained(tiny: Tiny) -> Callable[..., dict[str, Any]]:
    def train(folder: Path, **train: Any) -> dict[str, Any]:
        settings = {"eval_steps": 2, "save_steps": None, "per_device_eval_batch_size": 2} | train
        data = {"packing": False}  # So that there are several batches to be interrupted between.
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
        return run(RunConfig.from_dict(tiny.config("single", folder, data=data, lora=lora, train=settings)))

    return train


@pytest.fixture(scope="module")
def whole(trained: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    trained(folder, save_steps=2)
    return folder


def when(monkeypatch: pytest.MonkeyPatch, phase: str, act: Callable[[], Any]) -> None:
    """Do something when a phase of the run begins."""
    at = Heartbeat.at

    def noticed(self: Heartbeat, now: str) -> None:
        at(self, now)
        if now == phase:
            act()

    monkeypatch.setattr(Heartbeat, "at", noticed)


@pytest.mark.parametrize(
    ("name", "phase", "step"),
    [
        ("SIGTERM", "evaluation at step 6", 6),
        ("SIGINT", "evaluation at step 2", 2),
        ("SIGHUP", "forward of step 3", 3),
        ("SIGUSR1", "backward of step 5", 5),
    ],
)
def test_a_signal_saves_and_the_run_continues(
    name: str, phase: str, step: int, trained: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = {number: signal.getsignal(getattr(signal, number)) for number in SIGNALS}
    with monkeypatch.context() as patch:
        when(patch, phase, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(Stopped, match=rf"{name}: saved checkpoint-{step} in {tmp_path}.*train.resume true"):
            trained(tmp_path)
    assert {number: signal.getsignal(getattr(signal, number)) for number in SIGNALS} == previous
    if step < 6:  # The evaluation that was cut off has left no row.
        assert [row["step"] for row in lines(tmp_path) if "loss" in row] == list(range(1, step + 1))
    trained(tmp_path, resume="auto")
    assert lines(tmp_path) == lines(whole)
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, tmp_path)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize("phase", ["loading", "evaluation at step 0"])
def test_before_the_first_step_there_is_nothing_to_save(
    phase: str, trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when(monkeypatch, phase, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match=f"SIGINT: .* {tmp_path} holds no"):
        trained(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_was_trained_outlives_the_last_evaluation(
    trained: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise MemoryError

    when(monkeypatch, "evaluation at step 6", die)
    with pytest.raises(MemoryError):
        trained(tmp_path)
    kept, expected = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path, whole))
    assert kept.read_bytes() == expected.read_bytes()


def test_a_checkpoint_in_the_background_has_the_bytes_of_one_that_was_waited_for(
    trained: Callable, whole: Path, tmp_path: Path
) -> None:
    trained(tmp_path, save_steps=2, save_in_background=False)
    files = sorted(path.relative_to(whole) for path in whole.glob("checkpoint-*/**/*") if path.is_file())
    assert len(files) == 3 * 6
    for name in files:
        # The sums of a run's seconds are its own, and so is the hash of the file that holds them.
        if name.name not in ("state.json", "manifest.json"):
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "could not save it")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    writers: list[Any] = []
    write = saving.BackgroundWriter.write

    def noted(self: Any, job: Any) -> None:
        writers.append(self)
        write(self, job)

    monkeypatch.setattr(saving.BackgroundWriter, "write", noted)
    # The thread ends before the step does; the step begins all the same.
    when(monkeypatch, "forward of step 3", lambda: writers[0].join())
    with pytest.raises(OSError, match="could not save it"):
        trained(tmp_path, save_steps=2, eval_steps=None)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_takes_no_step(
    trained: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = TorchStateEngine.step
    monkeypatch.setattr(TorchStateEngine, "step", lambda self: (steps.append(1), step(self))[1])
    backward = torch.Tensor.backward

    def spoilt(self: torch.Tensor, *args: Any, **options: Any) -> None:
        backward(self * (float("nan") if len(steps) == 2 else 1.0), *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", spoilt)
    with pytest.raises(FloatingPointError, match=r"of step 3 .* though its loss is: layers\.\d\..*lora_.* on rank 0"):
        trained(tmp_path)
    assert len(steps) == 2
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 2]
