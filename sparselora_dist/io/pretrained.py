"""A model folder's config and tokenizer, read as data: code that lies in it is refused, never run and never asked about.

Left to itself Transformers asks on the terminal whether to trust such code, and takes a ``y`` from standard input.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..config import ConfigError
from ..config.run import ATTENTION_NAMES


def read_config(name_or_path: str) -> Any:
    """The config of a model folder, or of a model on the Hub.

    Raises:
        ConfigError: it names code of its own, or attention code that would be downloaded.
    """
    given, _ = PretrainedConfig.get_config_dict(name_or_path)
    _refuse_code(given, name_or_path, "config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if given.get(key) not in (None, *ATTENTION_NAMES):
            raise ConfigError(
                f"config.json of {name_or_path} has {key} {given[key]!r}, which is none of "
                f"{', '.join(ATTENTION_NAMES)}: kernels from elsewhere are never fetched; remove the key"
            )
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


def read_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a model folder, or of a model on the Hub.

    Raises:
        ConfigError: it names code of its own.
    """
    _refuse_code(get_tokenizer_config(name_or_path), name_or_path, "tokenizer_config.json")
    # Of a folder without a tokenizer class Transformers asks the model's config.
    _refuse_code(PretrainedConfig.get_config_dict(name_or_path)[0], name_or_path, "config.json")
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def _refuse_code(given: dict[str, Any], name_or_path: str, file: str) -> None:
    if code := given.get("auto_map"):
        named = code.values() if isinstance(code, dict) else [code]
        raise ConfigError(
            f"{file} of {name_or_path} names code of its own ('auto_map': {', '.join(map(str, named))}): it is never run "
            "here. Use a model that Transformers itself implements; if this is one, remove 'auto_map'"
        )


def check_positions(config: Any, max_length: int) -> None:
    """Of a model's config.

    Raises:
        ConfigError: rows may be longer than the positions that the model was made for.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(positions, int):
        return
    # YaRN and others stretch the positions by a factor, which some configs have multiplied in already.
    original = rope.get("original_max_position_embeddings") or positions
    reach = max(positions, int(original * float(rope.get("factor") or 1)))
    if max_length > reach:
        raise ConfigError(
            f"'data.max_length' is {max_length}, but the model was made for {reach} positions (max_position_embeddings): "
            f"allowed: integers from 2 to {reach}"
        )
