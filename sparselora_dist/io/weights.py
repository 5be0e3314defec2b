"""Where the frozen matrices come from when factors are made: a model in memory, a sharded one, or checkpoint files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..engines.shards import full_tensor
from ..families import decoder_layers, matrix_name
from .manifest import CorruptFileError


class WeightSource(Protocol):
    """Gives frozen matrices by layer and name."""

    collective: bool
    """Whether every rank must ask for the same matrix at the same time (sharded weights)."""

    def get(self, layer: int, name: str) -> Tensor:
        """The whole matrix (out, in), for example ``get(3, "gate_proj")``."""
        ...


class ModelWeights:
    """The matrices of a model in memory, gathered one at a time where an engine has sharded them."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        # Every rank holds its own copy of an unsharded model; a gather of shards needs all of them.
        self.collective = True

    def get(self, layer: int, name: str) -> Tensor:
        return full_tensor(self._layers[layer].matrix(name).weight)


class CheckpointWeights:
    """The matrices of a safetensors checkpoint folder (one file, or shards with an index), read one at a time.

    Args:
        folder: holds ``model.safetensors`` or ``model.safetensors.index.json``.
        dtype: what the matrices are cast to; the dtype that the model is loaded in.
    """

    collective = False

    def __init__(self, folder: str | Path, dtype: torch.dtype) -> None:
        self.folder = Path(folder)
        self.dtype = dtype
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), single.name)
        else:
            raise FileNotFoundError(f"{self.folder} holds neither {single.name} nor {index.name}")

    def get(self, layer: int, name: str) -> Tensor:
        key = f"model.{matrix_name(layer, name)}.weight"
        if key not in self._files:
            raise KeyError(f"{self.folder} has no tensor {key!r}")
        # An index may name files of its own folder only.
        path = self.folder / Path(self._files[key]).name
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key).to(self.dtype)
        except (SafetensorError, FileNotFoundError) as error:
            raise CorruptFileError(f"cannot read {key!r} from {path}: {error}") from error
