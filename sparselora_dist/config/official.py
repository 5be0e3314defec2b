"""The config formats of the official SparseLoRA release, read into the keys of a ``sparse_lora`` section.

First format, YAML: ``start_step``, ``mode: svd_8``, ``skip_output_tokens``, ``sparsity: {layers.N.mlp: s, ...}``.
Second format, ``config.json`` beside the factors: ``modes: {o1: {layer_sparsity: {model.layers.N.mlp: s, ...}}, ...}``.
Its flat form, which that release saves beside an adapter, has ``layer_sparsity`` at the top.
``args.json`` in a run's folder: the first format with all settings of its program beside, which are read past.
In all of them 0 is dense, ``self_attn`` stands for q, k, v and o, and a step of at most 1 is a fraction of the run.
"""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator, with_config
from typing_extensions import TypedDict

from .errors import ConfigError, join, require, show
from .limits import ALLOWED, Positive, Says
from .model import CONFIG, own, parse
from .ranges import compact_ranges

_LAYER = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.([0-9]{1,6})\.(mlp|self_attn)")
_SVD = re.compile(r"svd_([0-9]{1,4})")
_RANKS = ("predictor_rank", "rank", "svd_rank")
# Read and left aside: names for run folders, notes on where a file came from, where its program finds factors.
_NOTES = ("ffn_sparsity", "qkvo_sparsity", "base_model", "path", "predictor_basepath", "description", "model_type")
FOLDER_FILES = ("config.json", "args.json")
"""The official configs that a folder may hold, the first official one counts."""
_ARGUMENTS = "current_step"
"""A key that only ``args.json`` has."""
_AVERAGES = ("mlp_seq_avg", "qkvo_seq_avg")
_LABELS = "which tokens are dense follows from the labels"
_DENSE = "tokens whose logits enter the loss are always dense here"


def _step(value: Any) -> float | int | None:
    """Up to 1 a fraction of the run, above that a whole step number."""
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if number and (value <= 1 or value % 1 == 0):
        return float(value) if value <= 1 else int(value)
    raise ValueError("a fraction of the run in [0, 1], or a whole step number above 1")


def _output(value: object) -> bool:
    if value is not True:
        raise ValueError(f"true: {_DENSE}, only context tokens are sparse; set it to true or remove it")
    return True


_Rank = Annotated[Positive, ALLOWED]
_Step = Annotated[Any, AfterValidator(_step)]
_Layers = Annotated[dict[str, Any], ALLOWED, Says('an object such as {"layers.3.mlp": 0.99}')]
_ModeData = Annotated[dict[str, Any], ALLOWED, Says('an object such as {"layer_sparsity": {...}}')]
_MODES = Says('an object such as {"o1": {"layer_sparsity": {...}}}')


@with_config(CONFIG)
class _Mode(TypedDict, total=False):
    """What a mode may say. Several keys are known only at the value that means what this project does anyway."""

    mode: Any
    sparsity: _Layers
    layer_sparsity: _Layers
    start_step: _Step
    end_step: _Step
    predictor_rank: _Rank
    rank: _Rank
    svd_rank: _Rank
    sparse_lora_branch: Annotated[bool, ALLOWED, Says("true or false")]
    skip_output_tokens: Annotated[bool, BeforeValidator(_output)]
    sparse_output_tokens: Annotated[Literal[0], ALLOWED, Says(f"0: {_DENSE}")]
    skip_sink_tokens: Annotated[Literal[0, False], ALLOWED, Says("0: the first tokens are context like any other")]
    skip_random_tokens: Annotated[Literal[False], ALLOWED, Says(f"false: {_LABELS}")]
    min_sparse_length: Annotated[Literal[0], ALLOWED, Says(f"0: {_LABELS}")]
    qk_per_head: Annotated[Literal[False], ALLOWED, Says("false: channels are ranked over all heads of a layer")]
    qkvo_seq_avg: bool
    mlp_seq_avg: bool


@with_config(CONFIG)
class _File(_Mode, total=False):
    modes: Annotated[dict[str, _ModeData], MinLen(1), ALLOWED, _MODES]


def is_official(data: dict[str, Any]) -> bool:
    """Whether a config file is in one of the official formats: their main keys are none of ours."""
    return any(key in data for key in ("modes", "mode", "sparsity", "layer_sparsity"))


def read_official(data: dict[str, Any], mode: str = "o1") -> dict[str, Any]:
    """The keys of a ``sparse_lora`` section that say what ``data`` says; ``mode`` picks among its ``modes``."""
    data = own(data, "")
    if _ARGUMENTS in data:
        data = {key: value for key, value in data.items() if key in _File.__annotations__ | _Mode.__annotations__}
    if not is_official(data):
        names = ", ".join(map(str, data)) or "none"
        raise ConfigError(
            f"not an official SparseLoRA config (its keys: {names}): expected 'sparsity', 'layer_sparsity' or 'modes'"
        )
    settings = dict[str, Any](parse(_File, _without_notes(data), ""))
    at = f"modes.{mode}" if "modes" in settings else ""
    if at:
        modes = settings.pop("modes")
        if mode not in modes:
            raise ConfigError(f"mode '{mode}' is not in this file: available modes: {', '.join(modes)}")
        # What a mode says goes before what the file says.
        settings.update(parse(_Mode, _without_notes(modes[mode]), at))
    elif mode != "o1":
        raise ConfigError(f"mode '{mode}' was asked for, but this file has no 'modes'")
    enabled, rank = _mode_and_rank(settings)
    found = [key for key in ("layer_sparsity", "sparsity") if key in settings]
    if len(found) != 1:
        what = "both 'sparsity' and 'layer_sparsity' are" if found else "neither 'sparsity' nor 'layer_sparsity' is"
        raise ConfigError(f"{what} given{f' for mode {mode!r}' if at else ''}: give one of them")
    keys: dict[str, Any] = {"enabled": enabled, "rank": rank, "layers": _layers(settings[found[0]], join(at, found[0]))}
    keys |= {key: settings[key] for key in ("start_step", "end_step") if settings.get(key) is not None}
    if enabled:
        _say_averages(settings)
        keys["lora_branch"] = _lora_branch(settings, keys["layers"], at)
    return keys


def _say_averages(settings: dict[str, Any]) -> None:
    for key in _AVERAGES:
        if settings.get(key):
            warnings.warn(
                f"the official config says '{key}': true, the scores of a sequence's average; here every context token "
                "scores for itself, and other channels may be chosen (docs/official.md). False, or without it, is silent",
                stacklevel=2,
            )


def _lora_branch(settings: dict[str, Any], layers: dict[str, Any], at: str) -> str:
    """Whole, unless the file says ``sparse_lora_branch``, which here concerns the FFN alone."""
    if not settings.get("sparse_lora_branch", False):
        return "dense"
    if "qk" in layers:
        raise ConfigError(
            f"'{join(at, 'sparse_lora_branch')}' is true, and self_attn is sparse: the adapters of attention are always "
            "whole here. Set it to false, or self_attn to 0"
        )
    return "kept"


def _without_notes(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _NOTES}


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
    ranks |= {key: settings[key] for key in _RANKS if key in settings}
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"'{key}' says {value}" for key, value in ranks.items())
        raise ConfigError(f"the estimator's rank is given twice: {said}: keep one")
    return mode != "dense", next(iter(ranks.values()), 8)


def _layers(entries: dict[str, Any], at: str) -> dict[str, dict[str, float]]:
    """``{layers.N.mlp: s, ...}`` -> compact ranges per channel group, dense layers left out."""
    found: dict[str, dict[int, float]] = {"mlp": {}, "self_attn": {}}
    for key, value in entries.items():
        match = _LAYER.fullmatch(key)
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
