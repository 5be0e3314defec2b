"""What a model folder's tensors are stored as, from headers and marks: no matrix is read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .prequantized import stored_matrix
from .shard_files import TensorFiles, read_json

_ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_WEIGHT = ".weight"


@dataclass(slots=True)
class Storage:
    """The tensors that are stored in one way."""

    name: str
    """``bf16``, or the mark of who encoded them."""
    tensors: int = 0
    values: int = 0
    """That they stand for."""
    bytes: int = 0
    """Scales and all."""

    @property
    def bits(self) -> float:
        """A value."""
        return 8 * self.bytes / self.values if self.values else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bits": self.bits}


def stored_sizes(folder: Path) -> tuple[dict[str, Any] | None, list[Storage]]:
    """The ``quantization_config`` of a model folder, if there is one, and its storages, the largest first.

    Raises:
        FileNotFoundError, CorruptFileError: see :meth:`TensorFiles.of_model`.
        PrequantizedError: a matrix is encoded in a way that is not read.
    """
    files = TensorFiles.of_model(folder)
    groups: dict[str, list[str]] = {}
    for name in files.tensors:
        module, dot, _ = name.partition(_WEIGHT)
        groups.setdefault(module + dot, []).append(name)
    found: dict[str, Storage] = {}
    for key, names in groups.items():
        if key.endswith(_WEIGHT) and (matrix := stored_matrix(files, key)):
            _add(found, matrix.mark().rpartition(":")[0], math.prod(matrix.shape), sum(_size(files, n) for n in names))
            continue
        for name in names:
            dtype = files.tensors[name].dtype
            _add(found, _NAMES.get(dtype, dtype), math.prod(files.tensors[name].shape), _size(files, name))
    settings = read_json(folder / "config.json").get("quantization_config")
    return settings, sorted(found.values(), key=lambda storage: -storage.bytes)


def _add(found: dict[str, Storage], name: str, values: int, size: int) -> None:
    storage = found.setdefault(name, Storage(name))
    storage.tensors, storage.values, storage.bytes = storage.tensors + 1, storage.values + values, storage.bytes + size


def _size(files: TensorFiles, name: str) -> int:
    info = files.tensors[name]
    return math.prod(info.shape) * _ITEMSIZE.get(info.dtype, 1)
