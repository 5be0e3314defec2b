"""What a run computes with, key by key: equal on all ranks at the start, and equal to what a checkpoint was trained with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import ConfigError
from ..config.errors import show
from ..config.run import RunConfig
from ..data import TokenDataset
from ..io.checkpoint import checkpoint_digest
from ..io.shard_files import TensorFiles, read_json
from ..io.start_adapter import StartAdapter
from ..sync.everyone import everyone

Fingerprint = dict[str, Any]
"""Dotted key -> JSON value."""

_TRAIN = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "warmup_ratio", "warmup_steps", "seed", "group_by_length"),
)
# What nodes may say each in their own way: where things are, and what is shown.
_OWN = (
    *("model.name_or_path", "data.train", "data.eval", "lora.init_from", "sparse_lora.factors", "_comment"),
    "train.resume",
    *("train.output_dir", "train.logging_dir", "train.run_name", "train.report_to", "train.disable_tqdm"),
)
_MASK = ("enabled", "gradient", "min_sparsity")  # Where the adapter began decides no step after the first.
# In config.json, but not of the model.
_NOTES = ("_name_or_path", "transformers_version", "use_cache")
_PLACES, _VALUES = 4, 4096


def fingerprint(
    config: RunConfig, base: Any, weights: Path, data: TokenDataset, start: StartAdapter | None = None
) -> Fingerprint:
    """What decides the numbers of a run; the rest may change between a checkpoint and the run that continues it.

    Args:
        config: the run.
        base: the base model's config.
        weights: its folder. Of each tensor some rows are read.
        data: the training rows as they are tokenised.
        start: the adapter that the run starts from.
    """
    sparse = config.sparse_lora
    active: dict[str, Any] = {"enabled": sparse.enabled}
    if sparse.enabled:
        active = sparse.to_dict() | {"layers": sparse.sparsity(base.num_hidden_layers)}
        del active["factors"]
    run = config.to_dict()
    sections: dict[str, dict[str, Any]] = {
        "model": {"dtype": config.model.dtype},
        "data": {"max_length": config.data.max_length},
        "train": {key: run["train"][key] for key in _TRAIN},
        # Module names in any order.
        "lora": {key: sorted(value) if isinstance(value, list) else value for key, value in config.lora.values.items()},
        "sparse_lora": active,
        "sparse_base": {key: run["sparse_base"][key] for key in _MASK}
        if config.sparse_base.enabled
        else {"enabled": False},
        "quantization": config.quantization.identity,
    }
    found = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    found["lora.init_from"] = f"an adapter, SHA-256 {start.sha256[:16]}" if start else None
    found |= {"base model": model_digest(weights), "training data": data_digest(data)}
    return json.loads(json.dumps(found))


def on_all_ranks(config: RunConfig, own: Fingerprint, eval_data: TokenDataset | None, checkpoint: Path | None) -> None:
    """A collective. Every other setting of the run file is compared, too, but for paths and names.

    Args:
        config: the run, as this rank read it.
        own: this rank's :func:`fingerprint`.
        eval_data: this rank's evaluation rows.
        checkpoint: what this rank continues from.

    Raises:
        ConfigError: on every rank; names the first rank that differs from rank 0, its host, the keys and both values.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    settings = {
        f"{name}.{key}": value
        for name, section in config.to_dict().items()
        if isinstance(section, dict)
        for key, value in section.items()
    }
    mine = {key: value for key, value in settings.items() if key not in _OWN} | own
    mine["evaluation data"] = data_digest(eval_data) if eval_data else None
    mine["checkpoint"] = f"{checkpoint.name}, SHA-256 {checkpoint_digest(checkpoint)}" if checkpoint else None
    told = everyone((socket.gethostname(), mine))
    host, first = told[0]
    for rank, (other, theirs) in enumerate(told):
        if differing := _differences(theirs, first):
            raise ConfigError(
                f"rank {rank} on {other} differs from rank 0 on {host}: {_words(differing)}. Every rank needs the same run "
                "file, data, model and checkpoints"
            )


def same_as_saved(own: Fingerprint, saved: Fingerprint, checkpoint: Path) -> None:
    """Raises:
    ConfigError: the run would not continue what the checkpoint was trained with; names the keys and both values.
    """
    if saved and (differing := _differences(own, saved)):
        raise ConfigError(
            f"{checkpoint} was trained with other settings than this run's: {_words(differing)}. Make them equal, or train "
            "anew in another folder. Length, logging, saving, evaluation, optim, engine, and batch sizes at an equal global "
            "batch may change"
        )


def data_digest(data: TokenDataset) -> str:
    """Of every token, its label and where rows end."""
    digest = hashlib.sha256()
    for part in (data.tokens, data.mask, data.offsets):
        digest.update(np.ascontiguousarray(part))
    return f"{len(data)} rows, SHA-256 {digest.hexdigest()[:16]}"


def model_digest(folder: Path) -> str:
    """Of config.json, of every tensor's name, dtype and shape, and of some rows of each."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _NOTES}
    files = TensorFiles.of_model(folder)
    marks: dict[str, Any] = {"config.json": config}
    for name, rows in files.some_rows(_PLACES, _VALUES):
        info = files.tensors[name]
        marks[name] = [info.dtype, info.shape, hashlib.sha256(rows.view(torch.uint8).numpy()).hexdigest()]
    digest = hashlib.sha256(json.dumps(marks, sort_keys=True).encode())  # In any number of files.
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _lora_defaults() -> dict[str, Any]:
    import peft

    made = {item.name: item.default_factory for item in dataclasses.fields(peft.LoraConfig)}
    plain = {item.name: item.default for item in dataclasses.fields(peft.LoraConfig)}
    return {
        f"lora.{name}": plain[name] if factory is dataclasses.MISSING else factory() for name, factory in made.items()
    }


def _differences(mine: Fingerprint, other: Fingerprint) -> list[tuple[str, Any, Any]]:
    """Of the keys that both sides have: what is off has no settings, and an older version has fewer keys."""
    # A key of PEFT that one side leaves out has its default there.
    silent = {key: value for key, value in _lora_defaults().items() if key in mine or key in other}
    mine, other = _named(silent | mine), _named(silent | other)
    return [(key, mine[key], other[key]) for key in sorted(mine.keys() & other.keys()) if mine[key] != other[key]]


def _named(settings: Fingerprint) -> Fingerprint:
    """Without groups that have no layer: an older version knew fewer of them."""
    layers = settings.get("sparse_lora.layers")
    if not isinstance(layers, dict):
        return settings
    return settings | {"sparse_lora.layers": {group: by_layer for group, by_layer in layers.items() if by_layer}}


def _words(differing: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{key} is {show(mine)} here, {show(other)} there" for key, mine, other in differing)
