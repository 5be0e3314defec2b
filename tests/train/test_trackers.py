"""``train.report_to``: who is started, what they get, and that none of them can harm a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from sparselora_dist.config import ConfigError, RunConfig
from sparselora_dist.config.train import TrainSection
from sparselora_dist.train import run, trackers
from sparselora_dist.train.trackers import Trackers, chosen_trackers, hyperparameters

from .test_loop import settings

# The module; the package gives its function under the same name.
RUN = import_module("sparselora_dist.train.run")


class Recorder(GeneralTracker):
    """Keeps what it is told; raises where a test asks it to."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, *_: Any, broken: tuple[str, ...] = (), **__: Any) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.broken = broken

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def _note(self, what: str, value: Any) -> None:
        self.told.append(value)
        if what in self.broken:
            raise ConnectionError("the network is down")

    def start(self) -> None:
        self._note("start", "start")

    def store_init_configuration(self, values: dict) -> None:
        self._note("store", values)

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._note("log", (step, values))

    def finish(self) -> None:
        self._note("finish", "finish")


@pytest.fixture
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate's state as a process finds it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_names_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD, LoggerType.MLFLOW])

    def chosen(report_to: Any) -> list[str]:
        return chosen_trackers(TrainSection(output_dir="x", report_to=report_to))

    assert chosen("none") == []
    assert chosen("mlflow") == ["mlflow"]
    assert chosen("all") == chosen(["all", "none"]) == ["tensorboard", "mlflow"]
    with pytest.raises(ConfigError, match=r"'train.report_to' names wandb, comet_ml.*pip install wandb comet_ml"):
        chosen(["tensorboard", "wandb", "comet_ml"])


def test_a_failing_tracker_warns_once_and_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    down, up = Recorder(broken=("log", "finish")), Recorder()
    down.name = "down"
    running = Trackers([down, up])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            running.log({"step": step, "loss": 0.5})
        running.close()
    assert [step for step, _ in up.told[:-1]] == [1, 2, 3, 4, 5] and up.told[-1] == "finish"
    assert up.told[0] == (1, {"loss": 0.5})
    assert len(down.told) == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert "down failed (ConnectionError: the network is down)" in message and "Training goes on" in message


def test_a_tracker_that_recovers_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Recorder()
    running = Trackers([tracker])
    for step in range(1, 11):
        tracker.broken = ("log",) if step % 3 else ()
        running.log({"step": step, "loss": 0.5})
    assert [step for step, _ in tracker.told] == list(range(1, 11))
    assert len(caplog.records) == 1


def test_no_process_group_is_started(fresh_state: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a launcher has set the variables from which Accelerate would start one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    before = dict(os.environ)
    config = RunConfig.from_dict(settings(tmp_path, enabled=False))
    config = RunConfig.from_dict(config.to_dict() | {"train": config.to_dict()["train"] | {"report_to": "tensorboard"}})
    running = Trackers.start(config, 0)
    assert not dist.is_initialized()
    assert dict(os.environ) == before
    (tracker,) = running._trackers
    assert tracker.told == ["start", hyperparameters(config)]
    assert tracker.told[1]["lora.target_modules"] == '["q_proj", "v_proj"]'


def test_one_that_does_not_start_ends_the_run_at_once(
    fresh_state: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", lambda *_, **__: Recorder(broken=("start",)))
    monkeypatch.setattr(RUN, "build_model", lambda *_, **__: pytest.fail("the model was loaded"))
    config = settings(tmp_path / "run", enabled=False)
    config["train"]["report_to"] = "tensorboard"
    with pytest.raises(ConfigError, match=r"'train.report_to': tensorboard does not start: the network is down"):
        run(RunConfig.from_dict(config))


def test_trackers_are_closed_after_an_error_which_stays_what_it_was(
    fresh_state: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recorder(broken=("finish",))

    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the real error")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", lambda *_, **__: tracker)
    monkeypatch.setattr(RUN, "build_model", fail)
    config = settings(tmp_path / "run", enabled=False)
    config["train"]["report_to"] = "tensorboard"
    with pytest.raises(FloatingPointError, match="the real error"):
        run(RunConfig.from_dict(config))
    assert tracker.told[-1] == "finish"


def test_a_resumed_run_goes_on_where_the_axis_ended(fresh_state: None, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path / "run", enabled=False)
    config["train"] |= {"report_to": "tensorboard", "logging_dir": str(tmp_path / "board"), "save_steps": 2}
    run(RunConfig.from_dict(config))
    config["train"] |= {"max_steps": 3, "resume": True}
    run(RunConfig.from_dict(config))
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert not (tmp_path / "run" / "tensorboard").exists()
