"""Both config formats of the official SparseLoRA release, read into the keys of a ``sparse_lora`` section.

First format, YAML: ``start_step``, ``mode: svd_8``, ``skip_output_tokens``, ``sparsity: {layers.N.mlp: s, ...}``.
Second format, ``config.json`` beside the factors: ``modes: {o1: {layer_sparsity: {model.layers.N.mlp: s, ...}}, ...}``.
Its flat form, which that release saves beside an adapter, has ``layer_sparsity`` at the top.
In all of them 0 is dense, ``self_attn`` stands for q, k, v and o, and a step of at most 1 is a fraction of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .errors import ConfigError, require, show, unknown_key
from .model import refuse_code
from .ranges import compact_ranges

__all__ = ["is_official", "read_official"]

_LAYER = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.([0-9]{1,6})\.(mlp|self_attn)")
_SVD = re.compile(r"svd_([0-9]{1,4})")
_STEPS = ("start_step", "end_step")
_RANKS = ("predictor_rank", "rank", "svd_rank")
# Read and left aside: names for run folders, notes on where a file came from, where its program finds factors.
_NOTES = ("ffn_sparsity", "qkvo_sparsity", "base_model", "path", "predictor_basepath", "description", "model_type")
# Known, but only at the value that means what this project does anyway.
_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "skip_output_tokens": (
        (True,),
        "true: tokens whose logits enter the loss are always dense here, only context tokens are sparse; "
        "set it to true or remove it",
    ),
    "skip_sink_tokens": ((0, False), "0: the first tokens are context like any other"),
    "skip_random_tokens": ((False,), "false: which tokens are dense follows from the labels"),
    "min_sparse_length": ((0,), "0: which tokens are dense follows from the labels"),
    "sparse_output_tokens": ((0,), "0: tokens whose logits enter the loss are always dense here"),
    "qk_per_head": ((False,), "false: channels are ranked over all heads of a layer"),
    "qkvo_seq_avg": ((False, True), "true or false"),
    "mlp_seq_avg": ((False, True), "true or false"),
}
_FILE_KEYS = (*_STEPS, *_RANKS, *_NOTES, *_ONLY, "mode", "modes", "sparsity", "layer_sparsity", "sparse_lora_branch")
_MODE_KEYS = (*_STEPS, *_RANKS, *_NOTES, *_ONLY, "mode", "sparsity", "layer_sparsity", "sparse_lora_branch")


def is_official(data: dict[str, Any]) -> bool:
    """Whether a config file is in one of the official formats: their main keys are none of ours."""
    return any(key in data for key in ("modes", "mode", "sparsity", "layer_sparsity"))


def read_official(data: dict[str, Any], mode: str = "o1") -> dict[str, Any]:
    """The keys of a ``sparse_lora`` section that say what ``data`` says; ``mode`` picks among its ``modes``."""
    refuse_code(data)
    if not is_official(data):
        keys = ", ".join(map(str, data)) or "none"
        raise ConfigError(
            f"not an official SparseLoRA config (its keys: {keys}): expected 'sparsity', 'layer_sparsity' or 'modes'"
        )
    for key in data:
        if key not in _FILE_KEYS:
            raise unknown_key("", key, _FILE_KEYS)
    settings, at = dict(data), ""
    if "modes" in data:
        chosen = _choose_mode(settings.pop("modes"), mode)
        at = f"modes.{mode}."
        for key in chosen:
            if key not in _MODE_KEYS:
                raise unknown_key(f"modes.{mode}", key, _MODE_KEYS)
        settings.update(chosen)  # what a mode says goes before what the file says
    for key, (allowed, words) in _ONLY.items():
        if key in settings:
            value = settings[key]
            ok = any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)
            require(ok, key, value, words)
    enabled, rank = _mode_and_rank(settings)
    found = [key for key in ("layer_sparsity", "sparsity") if key in settings]
    if len(found) != 1:
        what = "both 'sparsity' and 'layer_sparsity' are" if found else "neither 'sparsity' nor 'layer_sparsity' is"
        raise ConfigError(f"{what} given{f' for mode {mode!r}' if at else ''}: give one of them")
    keys = {"enabled": enabled, "rank": rank, "layers": _layers(settings[found[0]], at + found[0])}
    for key in _STEPS:
        if settings.get(key) is not None:
            keys[key] = _step(settings[key], key)
    if "sparse_lora_branch" in settings:
        value = settings["sparse_lora_branch"]
        require(isinstance(value, bool), "sparse_lora_branch", value, "true or false")
        keys["lora_branch"] = "kept" if value else "dense"
    return keys


def _choose_mode(modes: object, mode: str) -> dict[str, Any]:
    require(
        isinstance(modes, dict) and bool(modes), "modes", modes, 'an object such as {"o1": {"layer_sparsity": {...}}}'
    )
    assert isinstance(modes, dict)
    if mode not in modes:
        raise ConfigError(f"mode '{mode}' is not in this file: available modes: {', '.join(map(str, modes))}")
    chosen = modes[mode]
    require(isinstance(chosen, dict), f"modes.{mode}", chosen, 'an object such as {"layer_sparsity": {...}}')
    return dict(chosen)


def _mode_and_rank(settings: dict[str, Any]) -> tuple[bool, int]:
    """``mode: svd_8`` is rank 8, ``mode: dense`` is switched off; the second format has ``predictor_rank`` instead."""
    ranks: dict[str, int] = {}
    mode = settings.get("mode", "svd")
    if "mode" in settings and mode != "dense":
        match = _SVD.fullmatch(mode) if isinstance(mode, str) else None
        if not match:
            raise ConfigError(
                f'\'mode\' is {show(mode)}: supported: "svd_8" (SVD estimator of rank 8, or another rank) and "dense"; '
                f"oracle and random selection are experiments of the paper that are not offered here"
            )
        ranks["mode"] = int(match[1])
    for key in _RANKS:
        if key in settings:
            value = settings[key]
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1, key, value, "integers from 1"
            )
            ranks[key] = value
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"'{key}' says {value}" for key, value in ranks.items())
        raise ConfigError(f"the estimator's rank is given twice: {said}: keep one")
    return mode != "dense", next(iter(ranks.values()), 8)


def _layers(entries: object, at: str) -> dict[str, dict[str, float]]:
    """``{layers.N.mlp: s, ...}`` -> compact ranges per channel group, dense layers left out."""
    require(isinstance(entries, dict), at, entries, 'an object such as {"layers.3.mlp": 0.99}')
    assert isinstance(entries, dict)
    found: dict[str, dict[int, float]] = {"mlp": {}, "self_attn": {}}
    for key, value in entries.items():
        match = _LAYER.fullmatch(key) if isinstance(key, str) else None
        if not match:
            raise ConfigError(
                f"'{at}' names {show(key)}, which is no layer: expected layers.N.mlp or layers.N.self_attn"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and 0 <= value < 1, f"{at}.{key}", value, "a number in [0, 1), the share of channels left out")
        layer, part = int(match[1]), match[2]
        if layer in found[part]:
            raise ConfigError(f"'{at}' names layer {layer} {part} twice, again as '{key}': keep one")
        found[part][layer] = float(value)
    sparse = {part: compact_ranges({n: s for n, s in layers.items() if s > 0}) for part, layers in found.items()}
    groups = {"ffn": sparse["mlp"], "qk": sparse["self_attn"], "vo": dict(sparse["self_attn"])}
    return {group: ranges for group, ranges in groups.items() if ranges}


def _step(value: object, key: str) -> float | int:
    """Up to 1 a fraction of the run, above that a whole step number."""
    convert: Callable[[Any], float | int] = float if isinstance(value, (int, float)) and value <= 1 else int
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and convert(value) == value
    require(ok, key, value, "a fraction of the run in [0, 1], or a whole step number above 1")
    return convert(value)
