"""Sensitivity of every layer and group to sparsity, and the sparsities that meet a FLOP target at the least loss."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from ..apply import find_state
from ..apply.build import build_model
from ..codecs import PlainCodec
from ..config.errors import ConfigError
from ..config.ranges import AUTO, compact_ranges
from ..config.run import RunConfig
from ..config.sparse import GROUPS, SparseLoRAConfig
from ..data import TokenDataset, load_dataset_tokens, padding_id
from ..engines import Engine, make_engine
from ..io.load import check_model, load_tokenizer
from ..io.manifest import write_text
from ..io.shard_files import TensorFiles
from ..io.start_adapter import completed, read_start
from ..io.stored_names import find_names
from ..io.weights import CheckpointWeights, checkpoint_folder
from ..layouts import decoder_layers, described
from ..method.flops import kept_channels
from ..plan.shapes import ModelShape, from_hf_config
from .allocate import Allocation, allocate
from .asked import Calibration
from .budget import Budget, Site
from .heatmap import HeatMap, check_drawable, draw
from .importance import layer_importance
from .probe import Prober
from .record import Record, from_main
from .sample import DataShape, Sample, data_shape, take_sample

log = logging.getLogger(__name__)

RECORD = "measurements.jsonl"


def calibrate(config: RunConfig, calibration: Calibration) -> dict[str, Any]:
    """Measure what is not measured yet, choose, and write; returns what ``curves.json`` holds. Every rank calls it.

    Everything that can be refused is refused before the model is loaded.

    Raises:
        ValueError: a target out of reach (with the range), data without context tokens, a record of another model.
    """
    check_drawable()
    engine = make_engine(config)
    curves = _Run(config, calibration, engine).run()
    engine.close()
    return curves


class _Run:
    def __init__(self, config: RunConfig, calibration: Calibration, engine: Engine) -> None:
        config = completed(config)
        self.config, self.engine, self.start = config, engine, read_start(config)
        if not engine.is_main:
            disable_progress_bar()
        self.shape: ModelShape = from_hf_config(check_model(config.model).to_dict(), config.model.name_or_path)
        tokenizer = load_tokenizer(config.model)
        data = config.data
        self.dataset: TokenDataset = load_dataset_tokens(
            data.train, tokenizer, data.max_length, "train", data.train_limit
        )
        self.pad_token_id = padding_id(tokenizer)
        size = calibration.batch_size(engine.ranks.world_size)
        self.sample: Sample = take_sample(self.dataset, calibration.rows, size, config.train.seed)
        self.data: DataShape = data_shape(self.dataset)
        able = self.shape.able
        groups = calibration.groups or tuple(group for group in GROUPS if able[group])
        if lacking := [group for group in groups if not able[group]]:
            raise ConfigError(f"'--groups' names {lacking[0]!r}, which no layer of {config.model.name_or_path} has")
        self.asked = replace(calibration, groups=groups)
        self.sites: list[Site] = [(layer, group) for group in groups for layer in able[group]]
        self.keep = {
            (layer, group, level): kept_channels(group, self.shape.channels[layer][group], level)
            for layer, group in self.sites
            for level in calibration.levels
        }
        self.budget = Budget(self.shape, config, self.data)
        keeps = {site: [self._kept(site, level) for level in calibration.levels] for site in self.sites}
        self.budget.check(calibration.target_flops, keeps)
        identity = from_main(engine, self._identity)
        self.record = Record(calibration.output / RECORD, identity, engine)
        self._prober: Prober | None = None

    def _kept(self, site: Site, level: float) -> int:
        """Channels that are kept there."""
        return self.keep[site[0], site[1], level]

    def _identity(self) -> dict[str, Any]:
        """What a measured loss depends on, beside site and kept channels."""
        config, sparse = self.config, self.config.sparse_lora
        files = TensorFiles.of_model(checkpoint_folder(config.model.name_or_path))
        codec, names = PlainCodec(torch.float32), ("q_proj", "v_proj", "gate_proj")
        if self.shape.data is None:
            weights = CheckpointWeights(files, codec, torch.float32)
            marks = [weights.mark(i, name) for i in range(self.shape.layers) for name in names]
        else:
            model = described(self.shape.data, config.model.name_or_path)
            find_names(model, files)
            layers = decoder_layers(model)
            weights = CheckpointWeights(files, codec, torch.float32, layers)
            marks = [weights.mark(layer.index, name) for layer in layers for name in layer.names]
        content = json.dumps([str(self.shape), marks]).encode()
        return {
            "model": config.model.name_or_path,
            "model_sha256": hashlib.sha256(content).hexdigest(),
            "dtype": config.model.dtype,
            "bnb_4bit_use_double_quant": False,
            **config.quantization.identity,
            "data": config.data.train,
            "data_sha256": self.sample.sha256,
            "rows": self.sample.rows,
            "batch": self.sample.batch_size,
            "rank": sparse.rank,
            "lora_branch": sparse.lora_branch,
            "init_from_sha256": self.start.sha256 if self.start else None,
            **({"loftq": config.lora.to_dict()} if config.lora.loftq_rounds else {}),
        }

    # --- measuring ----------------------------------------------------------------------------------------------------

    @property
    def prober(self) -> Prober:
        """Loads the model when something has to be measured. All ranks know the same values, so all do or none does."""
        if self._prober is None:
            config, asked = self.config, self.asked
            everywhere = {group: {AUTO: max(asked.levels)} for group in asked.groups}
            sparse = SparseLoRAConfig(
                rank=config.sparse_lora.rank, lora_branch=config.sparse_lora.lora_branch, layers=everywhere
            )
            set_seed(config.train.seed)
            model, _ = build_model(
                replace(config, sparse_lora=sparse),
                self.engine.placement(),
                local_ranks=self.engine.ranks.local_world_size,
                progress=self.engine.is_main,
                start=self.start,
            )
            state = find_state(model)
            assert state is not None
            self.engine.prepare(model)
            self._prober = Prober(self.engine, state.context, self.dataset, self.sample, self.pad_token_id)
        return self._prober

    def _loss(self, keep: Mapping[Site, int], name: str) -> float:
        if name not in self.record.values:
            self.record.add(name, self.prober.loss(keep))
        return float(self.record.values[name])

    def _importance(self) -> list[float]:
        if "importance" not in self.record.values:
            self.record.add("importance", layer_importance(self.prober))
        return list(self.record.values["importance"])

    def _curves(self) -> dict[str, dict[int, dict[float, float]]]:
        """Loss by group, layer and level, one site sparse at a time. Levels that keep the same channels are one."""
        jobs = [(layer, group, level) for layer, group in self.sites for level in self.asked.levels]
        names = {job: f"layer {job[0]} {job[1]} keep {self.keep[job]}" for job in jobs}
        done = sum(names[job] in self.record.values for job in jobs)
        if done and self.engine.is_main:
            log.info("%s: %d of %d measurements are there already", self.record.path, done, len(jobs))
        losses: dict[str, dict[int, dict[float, float]]] = {group: {} for group in self.asked.groups}
        hidden = not self.engine.is_main or self.config.train.disable_tqdm
        with tqdm(total=len(jobs), initial=done, disable=hidden, unit="probe", desc="calibrating") as bar:
            for layer, group, level in jobs:
                name = names[layer, group, level]
                new = name not in self.record.values
                bar.set_postfix_str(f"layer {layer} {group} {level:g}", refresh=False)
                loss = self._loss({(layer, group): self.keep[layer, group, level]}, name)
                losses[group].setdefault(layer, {})[level] = loss
                bar.update(new)
        return losses

    # --- choosing -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        dense = self._loss({}, "dense")
        importance = self._importance()
        losses = self._curves() if self.asked.criterion == "loss" else None
        predicted = self._predicted(losses, dense, importance)
        found: Allocation = from_main(self.engine, lambda: self._allocate(predicted))
        chosen = {site: self.asked.levels[n - 1] for site, n in zip(self.sites, found.choice) if n}
        keep = {site: self._kept(site, level) for site, level in chosen.items()}
        digest = hashlib.sha256(json.dumps(sorted((*site, k) for site, k in keep.items())).encode()).hexdigest()[:16]
        together = self._loss(keep, f"together {digest}")
        section = self._section(chosen)
        curves = {
            "format": "sparselora-curves/1",
            **{key: value for key, value in self.record.identity.items() if key != "format"},
            "command": self.asked.command,
            "criterion": self.asked.criterion,
            "groups": list(self.asked.groups),
            "levels": list(self.asked.levels),
            "channels": {group: self.shape.channels[self.shape.able[group][0]][group] for group in self.asked.groups},
            "context_share": self.data.context / self.data.tokens,
            "label_tokens": self.sample.labels,
            "dense_loss": dense,
            "losses": losses,
            "layer_importance": importance,
            "flops": {
                "target_share": self.asked.target_flops,
                "chosen_share": self.budget.share(keep),
                "dense_of_the_data": self.budget.dense,
                "saving_of_a_layer": self._savings(0),
                "saving_of_the_last_layer": self._savings(self.shape.layers - 1),
            },
            "choice": {
                "layers": section.layers,
                "proven_least": found.exact,
                "predicted_loss_increase": found.loss if losses else None,
                "measured_loss_increase": together - dense,
            },
        }
        if self.engine.is_main:
            self._write(section, curves, predicted, chosen)
        self.engine.barrier()
        return curves

    def _predicted(
        self, losses: dict[str, dict[int, dict[float, float]]] | None, dense: float, importance: list[float]
    ) -> dict[Site, dict[float, float]]:
        """What a level costs at a site: the measured increase, or for ``importance`` the layer's times level²."""
        if losses is None:
            return {site: {level: importance[site[0]] * level**2 for level in self.asked.levels} for site in self.sites}
        return {
            (layer, group): {level: loss - dense for level, loss in losses[group][layer].items()}
            for layer, group in self.sites
        }

    def _allocate(self, predicted: dict[Site, dict[float, float]]) -> Allocation:
        need = self.budget.executed({}) - self.asked.target_flops * self.budget.dense
        # A measured gain is noise of a finite sample: it counts as no loss, and is no reason to be sparse.
        options = [
            [(self.budget.saving(site, self._kept(site, level)), max(cost, 0.0)) for level, cost in costs.items()]
            for site, costs in predicted.items()
        ]
        return allocate(options, need)

    def _savings(self, layer: int) -> dict[str, dict[float, float]]:
        return {
            group: {
                level: self.budget.saving((layer, group), self.keep[layer, group, level]) for level in self.asked.levels
            }
            for group in self.asked.groups
            if (layer, group) in self.sites
        }

    def _section(self, chosen: dict[Site, float]) -> SparseLoRAConfig:
        layers = {}
        for group in self.asked.groups:
            found = {layer: level for (layer, of), level in chosen.items() if of == group}
            if found:
                layers[group] = compact_ranges(found)
        return replace(self.config.sparse_lora, enabled=True, layers=layers, factors=None)

    def _write(
        self,
        section: SparseLoRAConfig,
        curves: dict[str, Any],
        predicted: dict[Site, dict[float, float]],
        chosen: dict[Site, float],
    ) -> None:
        folder, choice = self.asked.output, curves["choice"]
        write_text(folder / "sparse_lora.json", json.dumps(section.to_dict(), indent=1))
        write_text(folder / "curves.json", json.dumps(curves, indent=1))
        measured = self.asked.criterion == "loss"
        draw(
            HeatMap(
                groups=self.asked.groups,
                levels=self.asked.levels,
                layers=self.shape.layers,
                values=predicted,
                chosen=chosen,
                importance=curves["layer_importance"],
                unit="loss increase, nats per label token" if measured else "layer importance x sparsity²",
                caption=(
                    f"{Path(self.config.model.name_or_path).name} on {Path(self.config.data.train).name}: "
                    f"{self.sample.rows} rows, {self.sample.labels} label tokens",
                    f"Chosen by {self.asked.criterion} for {self.asked.target_flops:.1%} of dense LoRA's FLOPs: "
                    f"{curves['flops']['chosen_share']:.1%} executed",
                    f"{curves['context_share']:.1%} of the tokens sparse",
                    f"Loss {curves['dense_loss']:.4f} dense, {choice['measured_loss_increase']:+.4f} with all chosen sites",
                ),
            ),
            folder / "sensitivity.png",
        )
