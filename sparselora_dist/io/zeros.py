"""Zeros of a model's matrices, read from its files a few rows at a time: how many, in which pattern, and which were lost.

A quantised matrix (bitsandbytes' NF4, fp8, nvfp4, mxfp4) is judged by its codes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..codecs.nf4_files import STATE, nonzero_of_codes
from .manifest import CorruptFileError
from .model_folder import PRUNING_FILE
from .prequantized import StoredMatrix, is_quantised, stored_matrix
from .shard_files import FLOATS, PACKED, TensorFiles, read_json

PATTERNS = ("1:4", "2:4", "4:8")
"""Those that are recognised, N kept of every M; the first that a matrix has is named."""
_VALUES = 1 << 24  # Looked at together.
_LAYER = re.compile(r"\.(\d+)\.(.+)")
_ROUNDED = 1e-6  # A record has six digits.


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixZeros:
    """Of one matrix; a stack of experts is one."""

    name: str
    """In the files, without ``.weight``."""
    layer: int | None
    """None of what is in no layer."""
    values: int
    zeros: int
    pattern: str | None
    """One of :data:`PATTERNS`; None: no pattern, or another."""
    recorded: float | None
    """Share of zeros that ``pruning.json`` says."""
    lost: int | None = None
    """Positions that were zero before and are not; None without a model before, or if that has no such matrix."""
    gained: int | None = None

    @property
    def share(self) -> float:
        return self.zeros / max(self.values, 1)

    @property
    def in_layer(self) -> str:
        """Its name in the layer."""
        found = _LAYER.search(self.name)
        return found[2] if found else self.name

    @property
    def short_of_record(self) -> bool:
        """Whether it has fewer zeros than ``pruning.json`` says."""
        return self.recorded is not None and self.share < self.recorded - _ROUNDED


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelZeros:
    """Of all matrices of a model, in the files' order."""

    folder: Path
    against: Path | None
    matrices: list[MatrixZeros]
    pruning: dict[str, Any] | None
    """``asked`` of ``pruning.json``."""

    @property
    def layers(self) -> dict[int, list[MatrixZeros]]:
        found: dict[int, list[MatrixZeros]] = {}
        for matrix in self.matrices:
            if matrix.layer is not None:
                found.setdefault(matrix.layer, []).append(matrix)
        return dict(sorted(found.items()))

    @property
    def share(self) -> float:
        """Of the matrices in layers together."""
        return mean_share([matrix for layer in self.layers.values() for matrix in layer])

    @property
    def lost(self) -> int | None:
        """Positions that were zero before and are not; None without a model before."""
        return None if self.against is None else sum(matrix.lost or 0 for matrix in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "folder": str(self.folder),
            "against": str(self.against) if self.against else None,
            "pruning": self.pruning,
            "sparsity": self.share,
            "lost": self.lost,
            "layers": {str(number): mean_share(layer) for number, layer in self.layers.items()},
            "matrices": [asdict(matrix) | {"sparsity": matrix.share} for matrix in self.matrices],
        }


def mean_share(matrices: list[MatrixZeros]) -> float:
    """Share of zeros of several matrices together."""
    return sum(matrix.zeros for matrix in matrices) / max(sum(matrix.values for matrix in matrices), 1)


def model_zeros(folder: str | Path, against: str | Path | None = None) -> ModelZeros:
    """Look at every matrix of a model folder.

    Args:
        folder: safetensors; plain, or quantised as a run reads it.
        against: the model before, in the same form or the other one.

    Raises:
        FileNotFoundError, CorruptFileError: a folder without whole safetensors files.
        ValueError: quantised in another way; a matrix that only the model before has, or that has another shape there.
    """
    after = _Matrices(Path(folder))
    before = _Matrices(Path(against)) if against is not None else None
    if before and (missing := sorted(before.shapes.keys() - after.shapes.keys())):
        raise ValueError(f"{after.folder} has no {missing[0]!r}, which {before.folder} has: they are different models")
    record = _record(after.folder)
    found = []
    for name, shape in tqdm(after.shapes.items(), desc="looking", unit="matrix", leave=False, disable=None):
        other = before if before and name in before.shapes else None
        if other and other.shapes[name] != shape:
            raise ValueError(f"{name!r} has shape {shape} in {after.folder}, {other.shapes[name]} in {other.folder}")
        found.append(_look(name, after, other, record))
    return ModelZeros(
        folder=after.folder,
        against=before.folder if before else None,
        matrices=found,
        pruning=record.get("asked"),
    )


class _Matrices:
    """The matrices of a folder: shapes by name, and where each is not zero."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder with a model")
        self.folder, self.files = folder, TensorFiles.of_model(folder)
        coded = [name.removesuffix(STATE) for name in self.files.tensors if name.endswith(STATE)]
        self.coded = {name: self._coded_shape(name) for name in coded}
        self.stored = {} if self.coded else self._stored()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, info in self.files.tensors.items():
            base = name.rpartition(".")[0]
            if name in self.coded:
                self.shapes[name] = self.coded[name]
            elif found := self.stored.get(name.removesuffix(PACKED)):
                self.shapes[name.removesuffix(PACKED)] = found.shape
            elif len(info.shape) > 1 and not {base, f"{base}.weight"} & (self.coded.keys() | self.stored.keys()):
                if info.dtype not in FLOATS:
                    raise ValueError(
                        f"{folder / info.file}: {name!r} is stored as {info.dtype}: zeros are read of floating point, of "
                        "bitsandbytes' nf4, and of fp8, nvfp4 and mxfp4"
                    )
                self.shapes[name] = info.shape

    def _stored(self) -> dict[str, StoredMatrix]:
        """The matrices of a checkpoint in small floats."""
        if not is_quantised(self.files):
            return {}
        names = [
            name.removesuffix(PACKED) for name in self.files.tensors if name.endswith((".weight", f".weight{PACKED}"))
        ]
        return {name: found for name in names if (found := stored_matrix(self.files, name))}

    def _coded_shape(self, name: str) -> tuple[int, ...]:
        try:
            rows, columns = json.loads(bytes(self.files.read(name + STATE).tolist()))["shape"]
            if math.prod(self.files.tensors[name].shape) != -(-rows * columns // 2):
                raise ValueError(f"{self.files.tensors[name].shape} codes of {(rows, columns)}")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{self.folder}: {name!r} is no 4-bit matrix ({error!r})") from error
        return rows, columns

    def kept(self, name: str) -> Iterator[Tensor]:
        """Where it is not zero, some rows after others: bool (rows, columns)."""
        shape = self.shapes[name]
        width = math.prod(shape[1:])
        step = max(2, _VALUES // max(width, 1) // 2 * 2)  # Even: a byte of codes is of one step.
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            if name in self.coded:
                codes = self.files.read(name, slice(start * width // 2, -(-stop * width // 2)))
                yield nonzero_of_codes(codes, (stop - start, width))
            elif found := self.stored.get(name):
                yield found.kept(start, stop)
            else:
                yield self.files.read(name, slice(start, stop)).view(-1, shape[-1]) != 0


def _look(name: str, after: _Matrices, before: _Matrices | None, record: dict[str, Any]) -> MatrixZeros:
    values = kept_values = lost = gained = 0
    most = dict.fromkeys(PATTERNS, 0)
    parts = before.kept(name) if before else None
    for kept in after.kept(name):
        values += kept.numel()
        kept_values += int(kept.sum())
        for pattern in PATTERNS:
            most[pattern] = max(most[pattern], _most(kept, pattern))
        if parts is not None:
            was = next(parts)
            lost += int((kept & ~was).sum())
            gained += int((was & ~kept).sum())
    patterns = [pattern for pattern in PATTERNS if most[pattern] <= int(pattern.partition(":")[0])]
    layer = _LAYER.search(name)
    own = name.removesuffix(".weight")
    recorded = record.get("layers", {}).get(layer[1], {}).get(layer[2].removesuffix(".weight")) if layer else None
    return MatrixZeros(
        name=own,
        layer=int(layer[1]) if layer else None,
        values=values,
        zeros=values - kept_values,
        pattern=patterns[0] if patterns else None,
        recorded=recorded,
        lost=lost if before else None,
        gained=gained if before else None,
    )


def _most(kept: Tensor, pattern: str) -> int:
    """The most that are kept in a group; more than any pattern keeps where groups do not divide the rows."""
    of = int(pattern.partition(":")[2])
    if kept.shape[1] % of:
        return of
    return int(kept.view(-1, of).sum(1, dtype=torch.uint8).max()) if kept.numel() else 0


def _record(folder: Path) -> dict[str, Any]:
    path = folder / PRUNING_FILE
    return read_json(path) if path.is_file() else {}
