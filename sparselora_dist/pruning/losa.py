"""LoSA (Huang et al. 2025, arXiv 2502.14816): prune a little, tune, and again, layers and ranks chosen anew each time.

A round looks at how alike the layers' inputs are, gives each layer its sparsity by that, prunes the merged weights, gives
each layer a rank by how far its outputs now are from the dense model's, and trains. The training is the project's own run:
whoever calls hands it in.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..config import ConfigError
from ..config.run import RunConfig
from ..engines import discover_ranks
from ..engines.ranks import local_device, start_distributed
from ..io.adapter_config import CONFIG_FILE
from ..io.model_folder import PRUNING_FILE
from ..io.shard_files import read_json
from ..sync.heartbeat import Heartbeat
from .criteria import METHODS
from .layer_rank import LARGEST, SMALLEST, layer_ranks, mean_rank
from .layer_share import BETA, importance, layer_shares, leeway, round_sparsity
from .pattern import Pattern
from .prune import Pruning, prune
from .resize import resize_adapter
from .round_run import parts_of_run, round_config
from .rounds import Rounds
from .similarity import layer_similarity

log = logging.getLogger(__name__)

Train = Callable[[RunConfig], dict[str, Any]]
"""``sparselora_dist.train.run``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoSA:
    """What is asked for."""

    config: RunConfig
    """The run. Its steps are dealt to the rounds; base model, ranks, masks and output folder are set in each."""
    sparsity: float
    """Share of zeros in the end."""
    output: Path
    """On several hosts, a folder that all of them see."""
    method: str = "wanda"
    rounds: int = 5
    data: str | None = None
    """Calibration rows; None is the run's training rows."""
    sequences: int = 128
    """Calibration sequences of the pruning and of the errors."""
    similar: int = 64
    """Those of them whose likeness is looked at."""
    length: int | None = None
    """Their tokens; None is 2048, or the model's positions."""
    ranks: tuple[float, float] = (6, 10)
    """Mean rank of the layers in the first round and in the last."""
    last_share: float = 0.6
    """Of the run's steps, what the last round takes; the others take equal parts of the rest."""


def losa(asked: LoSA, train: Train) -> dict[str, Any]:
    """Prune and tune; the record, ``losa.json`` in the output folder. A collective of all ranks of the launcher's.

    In the end ``model`` in the output folder is the pruned model and ``run/adapter`` the adapter on it, which
    ``sparselora-dist merge`` takes. Started again with the same it goes on in the round that was not finished, with the
    layer that was not pruned or from the last checkpoint.

    Raises:
        ConfigError: a number, a method or a key of the run that cannot be used; a folder begun with something else.
        FileExistsError: all rounds are in the output folder.
        ValueError, OSError: see :func:`.prune.prune` and the run.
    """
    _check(asked)
    place = discover_ranks()
    device = local_device(place)
    joins = dist.is_initialized()
    heartbeat = Heartbeat()
    if place.world_size > 1 or asked.config.engine.name != "single":
        timeouts = asked.config.train.ddp_timeout, asked.config.train.heartbeat_timeout
        place, heartbeat = start_distributed(place, *timeouts)
    rounds = Rounds(asked.output.absolute(), _words(asked), asked.rounds, place.rank == 0)
    try:
        rounds.begin()
        for number in range(1, asked.rounds + 1):
            if "trained" not in rounds.entry(number):
                _Round(asked, train, rounds, number, device, heartbeat).go()
    except BaseException as error:
        heartbeat.explain(error)
        raise
    if not joins:
        heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
    return rounds.record()


def _check(asked: LoSA) -> None:
    config = asked.config
    if asked.method not in METHODS:
        raise ConfigError(f"--method is {asked.method!r}: allowed: {', '.join(METHODS)}")
    Pattern.share(asked.sparsity)
    if asked.rounds < 1:
        raise ConfigError(f"--rounds is {asked.rounds}: allowed: integers from 1")
    if not 2 <= asked.similar <= asked.sequences:
        raise ConfigError(f"--similar is {asked.similar}: allowed: integers from 2 to --sequences, {asked.sequences}")
    if not all(SMALLEST <= rank <= LARGEST for rank in asked.ranks):
        raise ConfigError(f"--ranks is {asked.ranks}: allowed: numbers from {SMALLEST} to {LARGEST}")
    if not 0 < asked.last_share <= 1:
        raise ConfigError(f"--last-share is {asked.last_share}: allowed: numbers above 0, up to 1")
    if config.lora.init_from:
        raise ConfigError(
            "'lora.init_from' with LoSA: its first round starts from the base model alone; remove the key"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if config.lora.values.get(key):
            raise ConfigError(f"'lora.{key}' with LoSA, which gives every layer its rank: remove the key")


def _words(asked: LoSA) -> dict[str, Any]:
    """What a folder must have been begun with to be continued; how long and on what it trains, the runs check."""
    return {
        "model": asked.config.model.name_or_path,
        "method": asked.method,
        "sparsity": asked.sparsity,
        "rounds": asked.rounds,
        "data": asked.data or asked.config.data.train,
        "sequences": asked.sequences,
        "similar": asked.similar,
        "length": asked.length,
        "ranks": list(asked.ranks),
        "last_share": asked.last_share,
    }


class _Round:
    def __init__(
        self, asked: LoSA, train: Train, rounds: Rounds, number: int, device: torch.device, heartbeat: Heartbeat
    ) -> None:
        self.asked, self.train, self.rounds, self.number = asked, train, rounds, number
        self.device, self.heartbeat = device, heartbeat
        self.dense = asked.config.model.name_or_path
        self.data = asked.data or asked.config.data.train
        self.folder = rounds.folder(number)
        self.before = rounds.folder(number - 1) if number > 1 else None
        self.model, self.run = self.folder / "model", self.folder / "run"
        self.start = self.folder / "start" if self.before else None

    def go(self) -> None:
        """All of it that is not done yet."""
        shares = self._shares()
        ranks = self._ranks(self._errors(shares))
        self.rounds.on_main(lambda: self._begin_training(ranks))
        if not self.rounds.on_main((self.run / "summary.json").is_file):
            self._at("training")
            asked = self.asked
            part = parts_of_run(asked.rounds, asked.last_share)[self.number - 1]
            seed = self.number - 1
            self.train(round_config(asked.config, self.model, self.run, self.start, ranks, part, seed, min(shares)))
            gc.collect()  # The run's model is held by a circle of references.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.rounds.note(self.number, trained=self.rounds.on_main(self._outcome))

    def _sources(self) -> tuple[str, Path | None]:
        """The model that this round prunes, and the adapter on it."""
        if self.before is None:
            return self.dense, None
        return str(self.before / "model"), self.before / "run" / "adapter"

    def _shares(self) -> list[float]:
        """The sparsity of each layer."""
        if "layer_sparsity" not in self.rounds.entry(self.number):
            self._at("comparing the layers' inputs")
            asked = self.asked
            model, adapter = self._sources()
            found = layer_similarity(model, adapter, self.data, asked.similar, asked.length, self.device)

            def chosen() -> dict[str, Any]:
                mean = round_sparsity(asked.sparsity, self.number, asked.rounds)
                alike = found.alike()
                worth = importance(alike, BETA.get(asked.method, 1.0))
                shares = layer_shares(worth, mean, leeway(mean), found.weights)
                return {
                    "sparsity": mean,
                    "layers": found.layers,
                    "similarity": alike,
                    "importance": worth,
                    "layer_sparsity": shares,
                }

            self.rounds.note(self.number, **self.rounds.on_main(chosen))
        return self.rounds.entry(self.number)["layer_sparsity"]

    def _errors(self, shares: list[float]) -> list[float]:
        """What pruning has done to each layer; prunes."""
        asked = self.asked
        if not self.rounds.on_main(self.model.is_dir):
            self._at("pruning")
            model, adapter = self._sources()
            prune(
                Pruning(
                    model=model,
                    method=asked.method,
                    pattern=Pattern.share(self.rounds.entry(self.number)["sparsity"]),
                    output=self.model,
                    data=self.data,
                    sequences=asked.sequences,
                    length=asked.length,
                    layer_sparsity=tuple(shares),
                    adapter=adapter,
                    reference=self.dense,
                ),
                self.device,
            )
        errors = self.rounds.on_main(lambda: read_json(self.model / PRUNING_FILE)["errors"])
        return [errors[str(layer)] for layer in range(len(shares))]

    def _ranks(self, errors: list[float]) -> dict[str, int]:
        """By the layer's path."""
        if "ranks" not in self.rounds.entry(self.number):
            ranks = layer_ranks(errors, mean_rank(*self.asked.ranks, self.number, self.asked.rounds))
            self.rounds.note(self.number, errors=errors, ranks=ranks)
        entry = self.rounds.entry(self.number)
        return dict(zip(entry["layers"], entry["ranks"]))

    def _begin_training(self, ranks: dict[str, int]) -> None:
        """What is needed of the round before goes into this one's start; its pruned model is needed no more."""
        if self.before is None or self.start is None:
            return
        if not (self.start / CONFIG_FILE).is_file():
            seed = self.asked.config.train.seed + self.number
            resize_adapter(self.model / "adapter", self.start, ranks, seed)
        shutil.rmtree(self.before / "model", ignore_errors=True)

    def _outcome(self) -> dict[str, Any]:
        summary = read_json(self.run / "summary.json")
        return {key: summary.get(key) for key in ("eval_loss_start", "eval_loss", "train_loss_last")}

    def _at(self, what: str) -> None:
        self.heartbeat.at(f"{what}, round {self.number} of {self.asked.rounds}")
        if self.rounds.main:
            log.info("round %d of %d: %s", self.number, self.asked.rounds, what)
