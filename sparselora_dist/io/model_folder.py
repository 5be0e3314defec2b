"""What a folder with a model has, and how another one is written after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .manifest import publish

PRUNING_FILE = "pruning.json"
"""In the folder of a pruned model: how it was made."""

QUANTIZATION_FILE = "quantization.json"
"""In the folder of a model that ``sparselora-dist quantize`` made: how."""

# Everything else in a model folder is weights in other formats, or code.
_COMPANIONS = (
    "generation_config.json", "tokenizer*.json", "tokenizer.model*", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template*.json", "chat_template*.jinja",
    "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError, naming the file, where it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def publish_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """The same; the file appears when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_tensors(tensors, temporary)
    publish(temporary, path)


def output_config(raw: dict[str, Any], dtype: str, untied: bool = False) -> dict[str, Any]:
    """``config.json`` of a model of plain weights made from one with ``raw``."""
    # auto_map names Python files, which are neither run nor copied.
    config = {key: value for key, value in raw.items() if key not in ("quantization_config", "auto_map")}
    config["dtype"] = dtype
    if "torch_dtype" in config:  # What older versions of Transformers read.
        config["torch_dtype"] = dtype
    return config | ({"tie_word_embeddings": False} if untied else {})


def write_json(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation settings, licence."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, copy)
