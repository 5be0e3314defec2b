"""A model in its files, and its decoder layers one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..io.pretrained import check_positions, read_config, read_tokenizer
from ..io.shard_files import TensorFiles
from ..io.weights import checkpoint_folder
from .calibration import Calibration, read_sequences
from .layer_stream import LayerStream

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model of plain weights."""

    name: str
    folder: Path
    config: Any
    files: TensorFiles
    dtype: str
    stream: LayerStream

    @staticmethod
    def open(model: str, device: torch.device) -> ModelFiles:
        """Raises:
        ConfigError: quantised weights, or several dtypes.
        ValueError, OSError: the model cannot be read.
        """
        folder = checkpoint_folder(model)
        config = read_config(str(folder))
        if getattr(config, "quantization_config", None):
            raise ConfigError(f"--model {model} is quantised: give the model that it was made from")
        files = TensorFiles.of_model(folder)
        dtype = _dtype(files)
        return ModelFiles(
            model, folder, config, files, dtype, LayerStream(config, files, getattr(torch, dtype), device)
        )

    def sequences(self, data: str, count: int, length: int | None) -> Calibration:
        """``count`` of them; without a length, of 2048 tokens or as many as the model has positions.

        Raises:
            ConfigError: more positions than the model has, fewer tokens than are needed.
        """
        length = length or min(2048, getattr(self.config, "max_position_embeddings", 2048))
        check_positions(self.config, length)
        return read_sequences(data, read_tokenizer(str(self.folder)), count, length)


def _dtype(files: TensorFiles) -> str:
    matrices = {info.dtype for info in files.tensors.values() if len(info.shape) == 2}
    if len(matrices) != 1 or (only := next(iter(matrices))) not in _DTYPES:
        raise ConfigError(
            f"{files.folder} has matrices of {', '.join(sorted(matrices))}: allowed: one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[only]
