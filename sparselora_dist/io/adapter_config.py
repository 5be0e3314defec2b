"""What ``adapter_config.json`` may say: plain LoRA over base weights as they are, whoever reads the adapter."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

from .manifest import CorruptFileError
from .shard_files import TensorFiles, read_json

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
"""PEFT's, of the name of every tensor."""
# Keys of adapter_config.json that say nothing about the weights, or that are taken into account here. Any other key that
# is set is a variant of LoRA, of this version of PEFT or of a later one.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ ...) change them.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_config(path: Path, use: str, also: Container[str] = ()) -> Any:
    """PEFT's ``LoraConfig`` from a file.

    Args:
        path: of ``adapter_config.json``.
        use: what only plain LoRA can be, in a refusal's words: "merged", "started from".
        also: keys that whoever uses it takes into account, beside those that a merge does.

    Raises:
        FileNotFoundError, CorruptFileError: no such file, or no JSON object.
        ValueError: not plain LoRA, or no adapter of the base as it is; the key is named.
    """
    from peft import LoraConfig

    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise ValueError(f"{path}: 'peft_type' is {data.get('peft_type')!r}, only 'LORA' can be {use}")
    if data.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise ValueError(
            f"{path}: 'init_lora_weights' is {data['init_lora_weights']!r}, which changes the base weights: convert the "
            "adapter to plain LoRA first (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    for key, value in data.items():
        if key not in _UNDERSTOOD and key not in also and value:
            raise ValueError(f"{path}: {key!r} is {value!r}: only plain LoRA can be {use}")
    try:
        with warnings.catch_warnings():
            # Keys that this version does not know: they are not set, or whoever asks takes them into account.
            warnings.filterwarnings("ignore", "Unexpected keyword arguments")
            config = LoraConfig.from_pretrained(str(path.parent))
        patterns = (config.target_modules, config.exclude_modules, *config.rank_pattern, *config.alpha_pattern)
        for pattern in patterns:
            re.compile(pattern if isinstance(pattern, str) else "")
        for key, kinds, numbers in (
            ("rank", int, [config.r, *config.rank_pattern.values()]),
            ("alpha", (int, float), [config.lora_alpha, *config.alpha_pattern.values()]),
        ):
            if wrong := [n for n in numbers if not isinstance(n, kinds) or not math.isfinite(n) or n <= 0]:
                raise ValueError(f"{key} is {wrong[0]!r}, expected a positive number")
    except (TypeError, AttributeError, KeyError, ValueError, re.error) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def stored_shape(files: TensorFiles, key: str) -> tuple[int, ...]:
    """Of a tensor of an adapter's file.

    Raises:
        CorruptFileError: it is no floating point.
    """
    info = files.tensors[key]
    if info.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CorruptFileError(
            f"{files.folder / info.file}: {key!r} is stored as {info.dtype}, expected floating point"
        )
    return info.shape
