"""``train.report_to``: Accelerate's trackers, named and started as the Hugging Face Trainer's users expect."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import patch_environment
from transformers.utils.generic import flatten_dict

from ..config import ConfigError
from ..config.run import RunConfig
from ..config.train import TrainSection

log = logging.getLogger(__name__)

PROJECT = "sparselora-dist"
# Where the Trainer finds the project's name, and what each tool calls the name of a run.
_PROJECT_FROM = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "clearml": "CLEARML_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
}
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
    "dvclive": "exp_name",
}
# A tracker may wait minutes for its server; one that fails this often in a row is left out.
_PATIENCE = 3


def chosen_trackers(train: TrainSection) -> list[str]:
    """The names that ``report_to`` asks for; of "all", those that are installed.

    Raises:
        ConfigError: one of them is not installed.
    """
    installed = [tracker.value for tracker in get_available_trackers()]
    names = installed if "all" in train.trackers else list(train.trackers)
    if missing := [name for name in names if name not in installed]:
        raise ConfigError(
            f"'train.report_to' names {', '.join(missing)}, not installed here: pip install {' '.join(missing)}, or "
            "leave it out"
        )
    return names


class Trackers:
    """The trackers of a run, on rank 0; elsewhere none. A tracker that fails never ends the training."""

    def __init__(self, started: Sequence[GeneralTracker] = ()) -> None:
        self._trackers = list(started)
        self._failures: dict[str, int] = {}

    @classmethod
    def start(cls, config: RunConfig, start_step: int) -> Trackers:
        """Start what ``train.report_to`` names and store the settings of the run as hyperparameters.

        Args:
            config: the run.
            start_step: steps already done; TensorBoard drops later ones of a run that was cut off.

        Raises:
            ConfigError: a tracker is not installed, or does not start.
        """
        trackers = cls()
        # Accelerate's trackers ask its state for their rank. Only rank 0 comes here: a state of one process starts no
        # process group and sets no device.
        with patch_environment(LOCAL_RANK="-1"):
            PartialState()
        for name in chosen_trackers(config.train):
            try:
                tracker = _make(name, config.train, start_step)
                tracker.start()
            except Exception as error:
                trackers.close()
                raise ConfigError(f"'train.report_to': {name} does not start: {error}") from error
            trackers._trackers.append(tracker)
            trackers._try(tracker, "store_init_configuration", hyperparameters(config))
        return trackers

    def log(self, row: dict[str, float]) -> None:
        """One row of ``metrics.jsonl``, at its step."""
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker in list(self._trackers):
            self._try(tracker, "log", values, step=int(row["step"]))

    def close(self) -> None:
        """Finish them all; what was never started is left alone."""
        for tracker in self._trackers:
            self._try(tracker, "finish")
        self._trackers = []

    def _try(self, tracker: GeneralTracker, action: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(tracker, action)(*args, **kwargs)
            if tracker.name in self._failures:
                self._failures[tracker.name] = 0
        except Exception as error:
            if tracker.name not in self._failures:
                log.warning(
                    "train.report_to: %s failed (%s: %s). Training goes on, and metrics.jsonl has every figure; after %d "
                    "failures in a row it gets no more of them",
                    *(tracker.name, type(error).__name__, error, _PATIENCE),
                )
            self._failures[tracker.name] = self._failures.get(tracker.name, 0) + 1
            if action == "log" and self._failures[tracker.name] >= _PATIENCE:
                self._trackers.remove(tracker)


def hyperparameters(config: RunConfig) -> dict[str, Any]:
    """The run file, flat: ``{"train.learning_rate": 2e-4}``; lists as JSON."""
    return {
        name: json.dumps(value) if isinstance(value, (list, dict)) else value
        for name, value in flatten_dict(config.to_dict()).items()
    }


def _make(name: str, train: TrainSection, start_step: int) -> GeneralTracker:
    project = os.environ.get(_PROJECT_FROM.get(name, ""), PROJECT)
    folder = train.logging_dir or str(Path(train.output_dir) / name)
    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # Its tracker would put a folder of the project's name between.
        return make("", folder, purge_step=start_step + 1)
    if name == "aim":
        return make(train.run_name or project, folder, experiment=project)
    options: dict[str, Any] = {}
    if train.run_name and name in _RUN_NAME:
        options[_RUN_NAME[name]] = train.run_name
    if train.run_name and name == "comet_ml":
        from comet_ml import ExperimentConfig

        options["experiment_config"] = ExperimentConfig(name=train.run_name)
    return make(project, **options)
