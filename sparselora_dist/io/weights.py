"""Where the frozen matrices come from: safetensors files read slice by slice, or a model in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..codecs import Codec
from ..engines.shards import full_tensor
from ..families import decoder_layers, matrix_name
from ..layers.frozen import FrozenLinear
from .manifest import CorruptFileError
from .prequantized import prequantized

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FINGERPRINT_VALUES = 4096


def checkpoint_folder(name_or_path: str) -> Path:
    """The folder itself, or the hub's snapshot of a model's safetensors files, downloaded if need be."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, allow_patterns=["*.safetensors", "*.json"]))


class Checkpoint:
    """A safetensors checkpoint folder, one file or shards with an index. Only headers are read until a slice is asked for.

    Args:
        folder: holds ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: neither is there.
        CorruptFileError: a file that the index names is missing, truncated, or lacks a tensor; it is named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if index.is_file():
            try:
                files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptFileError(f"{index} is not a safetensors index: {error}") from error
        elif single.is_file():
            files = {}
        else:
            raise FileNotFoundError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        # An index may name files of its own folder only.
        self._files = {key: self.folder / Path(file).name for key, file in files.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())) or [single]:
            self._read_header(path, None if files else path)
        for key, path in self._files.items():
            if key not in self.shapes:
                raise CorruptFileError(f"{path} has no tensor {key!r}, which {INDEX_FILE} says it holds")

    def _read_header(self, path: Path, single: Path | None) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    self.shapes[key] = tuple(file.get_slice(key).get_shape())
                    if single:
                        self._files[key] = single
        except (SafetensorError, FileNotFoundError) as error:
            raise CorruptFileError(f"cannot read {path} of the base model: {_reason(path, error)}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def keys(self) -> Iterable[str]:
        return self._files.keys()

    def read(self, key: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """A part of a tensor, (rows, columns), in memory of its own. The rest of the file is not read."""
        path = self._files[key]
        try:
            # Opened for each tensor: closing it gives back the mapped pages.
            with safe_open(path, framework="pt") as file:
                view = file.get_slice(key)
                # A clone, because what is sliced is a view of the mapped file.
                return (view[rows] if columns is None else view[rows, columns]).clone()
        except SafetensorError as error:
            raise CorruptFileError(f"cannot read {key!r} from {path}: {error}") from error

    def sample(self, key: str) -> Tensor:
        """Some evenly spaced values; only their pages are read."""
        with safe_open(self._files[key], framework="pt") as file:
            return _spaced(file.get_tensor(key))


def _spaced(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].clone()


def fingerprint(weight: Tensor) -> str:
    """Short hash of a strided sample of a matrix."""
    return _digest(_spaced(weight), tuple(weight.shape))


def _digest(sample: Tensor, shape: tuple[int, ...]) -> str:
    """The same on every device and for every shard layout."""
    values = sample.float().cpu().contiguous()
    return hashlib.sha256(f"{shape}".encode() + values.numpy().tobytes()).hexdigest()[:32]


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file, but the index names it. Download the checkpoint again"
    return f"it is truncated or damaged ({path.stat().st_size} bytes; {error}). Download it again"


class WeightSource(Protocol):
    """Gives frozen matrices by layer and name, as they are computed with."""

    collective: bool
    """Whether every rank must ask for the same matrix at the same time (sharded weights)."""

    dtype: torch.dtype
    """Of the matrices."""

    def get(self, layer: int, name: str) -> Tensor:
        """The whole matrix (out, in), for example ``get(3, "gate_proj")``."""
        ...

    def mark(self, layer: int, name: str) -> str:
        """A short name of the matrix's content; equal marks mean equal matrices."""
        ...


class ModelWeights:
    """The matrices of a model in memory, gathered one at a time where an engine has sharded them."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        # Every rank holds its own copy of an unsharded model; a gather of shards needs all of them.
        self.collective = True
        norm: Any = self._layers[0].input_norm
        self.dtype: torch.dtype = norm.weight.dtype

    def get(self, layer: int, name: str) -> Tensor:
        linear: Any = self._layers[layer].matrix(name)
        if isinstance(linear, FrozenLinear):
            return linear.matrix([full_tensor(part) for part in linear.parts], self.dtype)
        return full_tensor(linear.weight)

    def mark(self, layer: int, name: str) -> str:
        return fingerprint(self.get(layer, name))


class CheckpointWeights:
    """The matrices of a checkpoint as a codec stores them, read one at a time by whoever asks."""

    collective = False

    def __init__(self, checkpoint: Checkpoint, codec: Codec, dtype: torch.dtype) -> None:
        self.checkpoint, self.codec, self.dtype = checkpoint, codec, dtype

    def get(self, layer: int, name: str) -> Tensor:
        key = weight_key(self.checkpoint, f"model.{matrix_name(layer, name)}.weight")
        if found := prequantized(self.checkpoint, key):
            return found.rows(0, found.shape[0]).to(self.dtype)
        return self.codec.roundtrip(self.checkpoint.read(key).to(self.dtype))

    def mark(self, layer: int, name: str) -> str:
        key = weight_key(self.checkpoint, f"model.{matrix_name(layer, name)}.weight")
        shape = self.checkpoint.shapes[key]
        if prequantized(self.checkpoint, key):
            return f"bitsandbytes:{_digest(self.checkpoint.sample(key), shape)}"
        return self.codec.mark + _digest(self.checkpoint.sample(key).to(self.dtype), shape)


def weight_key(checkpoint: Checkpoint, name: str) -> str:
    """The checkpoint's key of a parameter; a base model saved without its LM head lacks the ``model.`` in front.

    Raises:
        CorruptFileError: there is none.
    """
    for key in (name, name.removeprefix("model.")):
        if key in checkpoint:
            return key
    raise CorruptFileError(f"{checkpoint.folder} has no tensor {name!r}: it is not a whole checkpoint of this model")
