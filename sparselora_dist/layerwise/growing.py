"""A model folder that grows layer by layer, and appears when it is whole."""

from __future__ import annotations

import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..io.manifest import CorruptFileError, publish
from ..io.model_folder import PRUNING_FILE, copy_companions, output_config, publish_tensors, write_json
from ..io.shard_files import INDEX_FILE, TensorFiles, read_header, read_json

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}


class GrowingModel:
    """``<output>.partial`` until :meth:`finish`; a decoder layer a file, and the rest in the last.

    Args:
        output: the folder to be.
        files: the model that it is made from.
        record: what was asked for, with its ``dtype``; a folder that is there must have been begun with the same.
        layers: how many.
        record_file: the name of the JSON file that says how the model was made.

    Raises:
        FileExistsError: ``output`` is there.
        ConfigError: ``<output>.partial`` was begun with something else.
        OSError: no room on the disk.
    """

    def __init__(
        self, output: Path, files: TensorFiles, record: dict[str, Any], layers: int, record_file: str = PRUNING_FILE
    ) -> None:
        self.output, self.files, self.record, self.layers = output, files, record, layers
        self.record_file = record_file
        self.folder = output.with_name(f"{output.name}.partial")
        if output.exists() or output.is_symlink():
            raise FileExistsError(f"{output} exists already: choose another --output, or remove it")
        if (self.folder / record_file).is_file():
            begun = read_json(self.folder / record_file)["asked"]
            if different := [key for key in {**record, **begun} if begun.get(key) != record.get(key)]:
                key = different[0]
                raise ConfigError(
                    f"{self.folder} was begun with {key} {begun.get(key)!r}, not {record.get(key)!r}: give what it was "
                    "begun with to go on, or remove it"
                )
            return
        size = sum(math.prod(info.shape) for info in files.tensors.values()) * getattr(torch, record["dtype"]).itemsize
        output.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(output.parent).free) < size:
            raise OSError(f"{output.parent} has {free:,} bytes free, the model needs up to {size:,}")
        self.folder.mkdir(exist_ok=True)
        self._write({"version": version("sparselora-dist"), "asked": record, "layers": {}})

    def _write(self, data: dict[str, Any]) -> None:
        temporary = self.folder / f".{self.record_file}.tmp"
        write_json(data, temporary)
        publish(temporary, self.folder / self.record_file)

    def file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.layers + 1:05d}.safetensors"

    @property
    def done(self) -> int:
        """Layers that are written, from the first on."""
        return len(read_json(self.folder / self.record_file)["layers"])

    def layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer that was written."""
        written = TensorFiles(self.folder, [self.file(number)])
        return {name: written.read(name) for name in written.tensors}

    def add(
        self, number: int, tensors: dict[str, Tensor], figures: dict[str, float], error: float | None = None
    ) -> None:
        """Write a layer.

        Args:
            number: of the layer.
            tensors: by the files' names.
            figures: what is recorded of each of its matrices.
            error: how far its outputs are from the reference's, where there is one.
        """
        publish_tensors(tensors, self.folder / self.file(number))
        data = read_json(self.folder / self.record_file)
        data["layers"][str(number)] = {name: round(figure, 6) for name, figure in figures.items()}
        if error is not None:
            data.setdefault("errors", {})[str(number)] = error
        self._write(data)

    def note(self, **more: Any) -> None:
        """Record what is known in the end."""
        self._write(read_json(self.folder / self.record_file) | more)

    def finish(self, raw_config: dict[str, Any], quantization: dict[str, Any] | None = None) -> None:
        """Write everything that is no layer's, and let the folder appear.

        Args:
            raw_config: the source's ``config.json``.
            quantization: the ``quantization_config`` of a model whose matrices are encoded; what describes a matrix has
                its name and a word of its own behind it.
        """
        dtype = self.record["dtype"]
        weight_map: dict[str, str] = {}
        for number in range(self.layers):
            weight_map |= dict.fromkeys(read_header(self.folder / self.file(number)), self.file(number))
        rest = [name for name in self.files.tensors if name not in weight_map]
        publish_tensors(
            {name: self._plain(name, getattr(torch, dtype)) for name in rest}, self.folder / self.file(self.layers)
        )
        weight_map |= dict.fromkeys(rest, self.file(self.layers))
        names = {name.rpartition(".")[0] if name not in self.files.tensors else name for name in weight_map}
        if missing := names ^ set(self.files.tensors):
            raise CorruptFileError(f"{self.folder} does not hold the model's tensors: {sorted(missing)[0]}")
        counts = {name: math.prod(info.shape) for name, info in self.files.tensors.items()}
        total = {"total_parameters": sum(counts.values())}
        total["total_size"] = total["total_parameters"] * getattr(torch, dtype).itemsize
        if quantization:
            written = TensorFiles(self.folder, list(dict.fromkeys(weight_map.values()))).tensors.values()
            total["total_size"] = sum(math.prod(info.shape) * _BYTES.get(info.dtype, 1) for info in written)
        write_json({"metadata": total, "weight_map": weight_map}, self.folder / INDEX_FILE)
        config = output_config(raw_config, dtype) | ({"quantization_config": quantization} if quantization else {})
        write_json(config, self.folder / "config.json")
        copy_companions(self.files.folder, self.folder)
        publish(self.folder, self.output)

    def _plain(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.files.read(name)
        return value.to(dtype) if value.is_floating_point() else value
