"""What is pruned: a model in its files, read layer by layer, and an adapter on it where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..io.pretrained import check_positions, read_config, read_tokenizer
from ..io.shard_files import TensorFiles
from ..io.weights import checkpoint_folder
from ..layouts import DecoderLayer
from .calibration import Calibration, read_sequences
from .layer_adapter import LayerAdapter
from .layer_stream import LayerStream

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Source:
    """A model and its adapter."""

    name: str
    folder: Path
    config: Any
    files: TensorFiles
    dtype: str
    stream: LayerStream
    adapter: LayerAdapter | None

    @classmethod
    def open(cls, model: str, adapter: Path | None, device: torch.device) -> Source:
        """Raises:
        ConfigError: quantised weights, several dtypes; an adapter that changes more than matrices.
        ValueError, OSError: the model or the adapter cannot be read.
        """
        folder = checkpoint_folder(model)
        config = read_config(str(folder))
        if getattr(config, "quantization_config", None):
            raise ConfigError(f"--model {model} is quantised: prune the weights that it was made from")
        files = TensorFiles.of_model(folder)
        dtype = _dtype(files)
        stream = LayerStream(config, files, getattr(torch, dtype), device)
        return cls(model, folder, config, files, dtype, stream, LayerAdapter(adapter, files) if adapter else None)

    def sequences(self, data: str, count: int, length: int | None) -> Calibration:
        """``count`` of them; without a length, of 2048 tokens or as many as the model has positions.

        Raises:
            ConfigError: more positions than the model has, fewer tokens than are needed.
        """
        length = length or min(2048, getattr(self.config, "max_position_embeddings", 2048))
        check_positions(self.config, length)
        return read_sequences(data, read_tokenizer(str(self.folder)), count, length)

    @contextmanager
    def merged(self, layer: DecoderLayer) -> Iterator[dict[str, Tensor]]:
        """The layer as it computes with the adapter; gives, by the linear's name, what is stored of those it changes."""
        with self.stream.filled(layer):
            stored = {}
            for name, linear, key in self.adapted(layer):
                assert self.adapter
                stored[name] = linear.weight.data
                linear.weight.data = self.adapter.merged(key, stored[name]).to(stored[name].dtype)
            yield stored

    def put_adapter(self, layer: DecoderLayer) -> None:
        """Under the zeros that a filled layer has now."""
        for _, linear, key in self.adapted(layer):
            assert self.adapter
            linear.weight.data = self.adapter.effective(key, linear.weight.data)

    def adapted(self, layer: DecoderLayer) -> Iterator[tuple[str, nn.Linear, str]]:
        """(name, linear, name in the files) of those of a layer that the adapter changes."""
        for name, linear in self.stream.linears(layer).items():
            key = self.stream.key(layer, f"{name}.weight")
            if self.adapter and self.adapter.touches(key):
                yield name, linear, key


def _dtype(files: TensorFiles) -> str:
    matrices = {info.dtype for info in files.tensors.values() if len(info.shape) == 2}
    if len(matrices) != 1 or (only := next(iter(matrices))) not in _DTYPES:
        raise ConfigError(
            f"{files.folder} has matrices of {', '.join(sorted(matrices))}: allowed: one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[only]
