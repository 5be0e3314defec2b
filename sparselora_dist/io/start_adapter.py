"""The adapter that a run starts from (``lora.init_from``): found, read and checked before the model is loaded.

What its ``adapter_config.json`` says and the run does not is taken from there; what both say must be the same. A
safetensors file alone, as a hypernetwork writes it, has no config: the run says all. Names are taken with PEFT's prefix
and without it, and with an adapter's name in them or not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ..config import ConfigError
from ..config.errors import show
from ..config.lora import LoraSection
from ..config.run import RunConfig
from .adapter import ADAPTER_FILE, saved_names
from .adapter_config import CONFIG_FILE, PREFIX, read_adapter_config, stored_shape
from .load import check_model, model_without_weights
from .loftq import CODE_BITS, ROUNDS, START, Mark
from .manifest import CorruptFileError, tensors_sha256
from .marker import KEY, marked_modules
from .shard_files import TensorFiles, read_json

_KEY = "lora.init_from"
# What makes the adapter the function that it is.
_SHAPE = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "lora_bias", "bias", "modules_to_save", "target_parameters", "fan_in_fan_out"),
    "ensure_weight_tying",
)
# A setting of training: the run may have its own.
_FREE = ("lora_dropout",)
# Keys that a merge does not take, and a run does.
_ALSO = {"fan_in_fan_out", "target_parameters", KEY, ROUNDS, CODE_BITS}
# Without a config there is nobody else to ask.
_BARE = ("r", "lora_alpha", "target_modules")
_ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+")
_COPY_NAME = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """The values that a run's adapter has before its first step."""

    path: Path
    tensors: dict[str, Tensor]
    """fp32 on the CPU, by the names that PEFT gives them on disk."""
    sha256: str
    """Of names and values, wherever the file is and however it calls them."""


def completed(config: RunConfig) -> RunConfig:
    """The run with a ``lora`` section that says all that its adapter's config does; without ``init_from`` as it is.

    A run that starts by LoftQ over a model that was quantised so begins at the adapter beside it.

    Raises:
        ConfigError: no such file; run and adapter contradict each other (key and both values); something that only the
            run could say is missing; an adapter of a pruned model's zeros in a run without ``sparse_base``.
        FileNotFoundError, CorruptFileError, ValueError: see :func:`read_adapter_config`.
    """
    lora = config.lora
    beside = _beside(config) if lora.loftq_rounds else None
    if beside:
        lora = lora.started_at(str(beside))
    if lora.init_from is None:
        return config
    file, described = _find(lora.init_from)
    if described is None:
        return replace(config, lora=_said(lora, file))
    if Mark.read(read_json(described), described):
        raise ConfigError(
            f"{described} says 'loftq': the adapter belongs to another base, the one that its run has stored, and over this "
            "run's it computes something else. Merge it and train on the result, or start from another adapter"
        )
    if not beside:
        _check_base(described, config)
    adapter = read_adapter_config(described, "started from", _ALSO)
    _check_zeros(described, config)
    plain = LoraConfig()
    taken = {key: getattr(adapter, key, None) for key in (*_SHAPE, *_FREE)}
    taken = {
        key: _json(value)
        for key, value in taken.items()
        if value is not None and (key in _BARE or value != getattr(plain, key, None))
    }
    try:
        whole = lora.completed(taken)
        mine = whole.build()
    except ConfigError as error:
        raise ConfigError(f"{error} (with what {described} says)") from error
    for key in lora.values:
        own, theirs = _comparable(getattr(mine, key, None)), _comparable(getattr(adapter, key, None))
        if key not in _SHAPE or own == theirs or (key == "target_modules" and theirs is None):
            continue
        if key in ("target_modules", "exclude_modules") and (isinstance(own, str) or isinstance(theirs, str)):
            continue  # An expression may name the same modules: the tensors show it.
        other = "" if beside else f"leave 'lora.{key}' out, or "
        default = " (the default)" if beside and config.lora.is_default(key) else ""
        raise ConfigError(
            f"'lora.{key}' is {show(lora.values[key])}{default}, but {described}, where the adapter starts, says "
            f"{show(_json(getattr(adapter, key, None)))}: {other}make them equal"
        )
    return replace(config, lora=whole)


def read_start(config: RunConfig) -> StartAdapter | None:
    """The values, whole and checked against what PEFT would make of the base model; None without ``init_from``.

    Args:
        config: as :func:`completed` gave it.

    Raises:
        ConfigError: the run adapts nothing of this model.
        FileNotFoundError, CorruptFileError: a file that is missing or truncated; a tensor that is missing, belongs to
            nothing, has another shape or rank, or holds NaN or infinity. The tensor is named.
    """
    if config.lora.init_from is None:
        return None
    file, _ = _find(config.lora.init_from)
    files = TensorFiles(file.parent, [file.name])
    keys = _by_saved_name(files)
    _check(keys, files, _expected(config), config.lora)
    tensors = {}
    for name, key in keys.items():
        value = files.read(key)
        files.check_finite(key, value)
        tensors[name] = value.float()
    return StartAdapter(file, tensors, tensors_sha256(tensors))


# --- the config ----------------------------------------------------------------------------------------------------------


def _find(given: str) -> tuple[Path, Path | None]:
    """The safetensors file and the ``adapter_config.json`` beside it, where there is one."""
    path = Path(given)
    if path.is_dir():
        file = path / ADAPTER_FILE
        if not file.is_file():
            pickled = " (adapter_model.bin is never loaded)" if (path / "adapter_model.bin").is_file() else ""
            raise ConfigError(f"'{_KEY}' is {show(given)}, a folder without {ADAPTER_FILE}{pickled}: name another")
        return file, path / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"'{_KEY}' is {show(given)}, which does not exist: allowed: a folder that PEFT wrote, or a safetensors file"
        )
    described = path.parent / CONFIG_FILE
    return path, described if described.is_file() else None


def _said(lora: LoraSection, file: Path) -> LoraSection:
    """Of a file without a config."""
    if missing := [key for key in _BARE if key not in lora.values]:
        files = TensorFiles(file.parent, [file.name])
        found = _by_saved_name(files)
        ranks = sorted({files.tensors[key].shape[0] for name, key in found.items() if name.endswith(".lora_A.weight")})
        raise ConfigError(
            f"'{_KEY}' is {show(lora.init_from)}, without {CONFIG_FILE} beside it: the run must say "
            f"{', '.join(f'lora.{key}' for key in missing)} (its tensors: rank {', '.join(map(str, ranks)) or 'unknown'} on "
            f"{_modules(found)}; no file says its alpha)"
        )
    return lora.completed({})


def _check_zeros(described: Path, config: RunConfig) -> None:
    if marked_modules(read_json(described), described) and not config.sparse_base.enabled:
        raise ConfigError(
            f"{described} says 'sparse_base': the adapter was trained under the zeros of a pruned model, and computes "
            "something else without them. Set 'sparse_base.enabled' to true, or start from another adapter"
        )


def _beside(config: RunConfig) -> Path | None:
    """The adapter that lies in the folder of the run's base because it starts over that.

    Raises:
        ConfigError: the run says other rounds or other bits than it was made with.
    """
    folder = _start_folder(config)
    made = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if ROUNDS not in made:
        return None
    rounds, said = made[ROUNDS], config.lora.loftq_rounds
    if said not in (1, rounds):  # One is also what a run says that says nothing.
        raise ConfigError(
            f"'lora.loftq_config.loftq_iter' is {said}, but {folder} was made in {show(rounds)} rounds: leave it out, or "
            "quantise the model anew"
        )
    config.lora.check_bits(f"{folder.parent} holds codes", made.get(CODE_BITS, 0))
    return folder


def _start_folder(config: RunConfig) -> Path:
    name = config.model.name_or_path
    if Path(name).is_dir():
        return Path(name) / START
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[f"{START}/*"])) / START


def _check_base(described: Path, config: RunConfig) -> None:
    """An adapter that lies beside its base starts over no other."""
    if read_json(described).get(ROUNDS) and described.parent.resolve() != _start_folder(config).resolve():
        raise ConfigError(
            f"{described} says '{ROUNDS}': the adapter makes up for what storing the model in the folder around it took "
            f"away, and 'model.name_or_path' is {show(config.model.name_or_path)}: name {described.parent.parent}, or start "
            "from what lies in the model's own folder"
        )


def _json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _comparable(value: Any) -> Any:
    """Nothing is nothing, however it is written; a list of names has no order."""
    return (sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value) or None


# --- the tensors ---------------------------------------------------------------------------------------------------------


def _by_saved_name(files: TensorFiles) -> dict[str, str]:
    """PEFT's name on disk -> the file's own."""
    keys: dict[str, str] = {}
    for key in files.tensors:
        name = _COPY_NAME.sub("", _ADAPTER_NAME.sub(r"\1", key))
        name = name if name.startswith(PREFIX) else PREFIX + name
        if name in keys:
            raise CorruptFileError(
                f"{files.folder / files.tensors[key].file} holds {keys[name]!r} and {key!r}, which are one tensor of an "
                "adapter: keep one adapter in the file"
            )
        keys[name] = key
    return keys


def _expected(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """By the names of the adapter file that this run would save, the shapes; on a model without weights."""
    section = config.model
    base = check_model(section)
    base.__dict__.pop("quantization_config", None)
    model: Any = model_without_weights(base, getattr(torch, section.dtype), section.attn_implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What PEFT has to say is said when the run's own model is made.
        try:
            adapted: Any = get_peft_model(model, config.lora.build(), low_cpu_mem_usage=True)
        except ValueError as error:
            raise ConfigError(f"'lora' does not fit {section.name_or_path}: {error}") from error
    shapes = {name: tuple(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
    return {saved: shapes[own] for saved, own in saved_names(adapted, shapes).items()}


def _check(
    keys: Mapping[str, str], files: TensorFiles, expected: Mapping[str, tuple[int, ...]], lora: LoraSection
) -> None:
    """Every tensor has its place, and every place its tensor."""
    if not keys:
        raise CorruptFileError(f"{_path(files)} is empty")
    path = _path(files)
    asked = f"'lora.target_modules' is {show(lora.values['target_modules'])}, the file has tensors of {_modules(keys)}"
    if extra := [key for name, key in keys.items() if name not in expected]:
        if dora := [key for key in extra if "lora_magnitude_vector" in key]:
            raise CorruptFileError(f"{path}: {dora[0]!r} is DoRA's: only plain LoRA can be started from")
        raise CorruptFileError(
            f"{path}: {extra[0]!r}{_more(extra)} belongs to nothing that the run adapts in the base model: {asked}"
        )
    if missing := [name for name in expected if name not in keys]:
        raise CorruptFileError(f"{path}: {missing[0]!r}{_more(missing)} is missing: {asked}")
    for name, key in keys.items():
        shape, wanted = stored_shape(files, key), expected[name]
        if shape == wanted:
            continue
        side = 0 if name.endswith(".lora_A.weight") else 1 if name.endswith(".lora_B.weight") else None
        why = "the adapter is another base model's"
        if side is not None and len(shape) == len(wanted) and shape[1 - side] == wanted[1 - side]:
            why = f"its rank is {shape[side]}, and 'lora.r' with 'lora.rank_pattern' says {wanted[side]}"
        raise CorruptFileError(f"{path}: {key!r} has shape {shape}, expected {wanted}: {why}")


def _path(files: TensorFiles) -> Path:
    return files.folder / next(iter(files.tensors.values())).file if files.tensors else files.folder


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _modules(names: Iterable[str]) -> str:
    """The last names of the modules that an adapter's tensors are of."""
    found = {name.split(".lora_")[0].removesuffix(".weight").rsplit(".", 1)[-1] for name in names}
    return ", ".join(sorted(found)) or "nothing"
