"""The safetensors files of a folder: headers read and checked first, then tensors or slices of them, nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .manifest import CorruptFileError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes whose numbers are the values that are meant."""
PACKED = "_packed"
"""Ends the name of a matrix whose codes are not one a value: ``X.weight_packed`` in the place of ``X.weight``."""
_SAMPLE_VALUES = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says about a tensor."""

    file: str
    dtype: str
    """In safetensors' names: ``BF16``, ``F32``, ``U8`` ..."""
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing or broken file is named."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path} holds no JSON object")
    return data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, without reading them.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: the file is not as long as its header says, or has none; file and sizes are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = int.from_bytes(file.read(8), "little") + 8
        if not 8 < start <= size:
            raise CorruptFileError(f"{path} is truncated or not a safetensors file. Pickle files are never loaded")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            found = {
                name: TensorInfo(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in header.items()
            }
            end = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CorruptFileError(f"{path} has no valid safetensors header ({error!r})") from error
    if end != size:
        state = "truncated" if size < end else "longer than it should be"
        raise CorruptFileError(f"{path} is {state}: its header describes {end} bytes, the file has {size}")
    try:
        with safe_open(path, framework="pt"):
            return found
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is not a valid safetensors file: {error}") from error


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter (E, rows, columns) whose experts the files hold one by one, each as one matrix or several to be joined."""

    keys: tuple[tuple[str, ...], ...]
    """Of each expert, its matrices in the order of their rows."""
    shape: tuple[int, ...]

    def coded(self, files: TensorFiles, experts: slice = slice(None)) -> list[str]:
        """Those matrices that are quantised."""
        return [key for keys in self.keys[experts] for key in keys if files.tensors[key].dtype not in FLOATS]

    def read(self, files: TensorFiles, experts: slice) -> Tensor:
        """(experts, rows, columns), in memory of its own.

        Raises:
            ValueError: they are quantised.
        """
        if coded := self.coded(files, experts):
            raise ValueError(f"{coded[0]} of {files.folder} is quantised: it has no values")
        joined = [torch.cat([files.read(key) for key in keys]) for keys in self.keys[experts]]
        return torch.stack(joined) if joined else torch.empty((0, *self.shape[1:]))


class TensorFiles:
    """The tensors of one or more safetensors files of a folder. Floats of 8 bits are given as their bytes, uint8.

    Attributes:
        tensors: what the headers say, by tensor name, in the order of the files.
        sharded: whether an index names the files.
        renamed: what the files call a model's parameter, where they use another name.
        stacks: a model's parameters that are many tensors in the files.
    """

    def __init__(self, folder: Path, files: list[str], sharded: bool = False) -> None:
        self.folder, self.sharded = folder, sharded
        self._kept: tuple[ExitStack, dict[Path, Any]] | None = None
        self.renamed: dict[str, str] = {}
        self.stacks: dict[str, Stack] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(folder / file).items():
                if name in self.tensors:
                    raise CorruptFileError(f"{folder}: {name!r} is in {self.tensors[name].file} and in {file}")
                self.tensors[name] = info

    @classmethod
    def of_model(cls, folder: Path) -> TensorFiles:
        """A model folder: one file, or shards that match their index.

        Raises:
            FileNotFoundError: no weights in safetensors, or a shard is missing.
            CorruptFileError: a damaged file, or an index that does not tell what the files hold.
        """
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.is_file() and index.is_file():
            raise CorruptFileError(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: keep the one that is meant")
        if single.is_file():
            return cls(folder, [SINGLE_FILE])
        if not index.is_file():
            raise FileNotFoundError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights are never loaded"
            )
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
            raise CorruptFileError(f"{index} has no 'weight_map' from tensor names to file names")
        files = list(dict.fromkeys(named.values()))
        if outside := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise CorruptFileError(f"{index} names {outside[0]!r}: expected .safetensors files of its own folder")
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(missing)}")
        found = cls(folder, files, sharded=True)
        for name, file in named.items():
            if name not in found.tensors or found.tensors[name].file != file:
                raise CorruptFileError(f"{folder / file} does not hold {name!r}, which {INDEX_FILE} says it does")
        if extra := next((name for name in found.tensors if name not in named), None):
            raise CorruptFileError(f"{index} does not name {extra!r}, which {found.tensors[extra].file} holds")
        return found

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Files stay open, for many small tensors: to open one is to read what its header says of all its tensors. The
        pages that are mapped meanwhile are given back at the end."""
        if self._kept is not None:
            yield
            return
        with ExitStack() as files:
            self._kept = files, {}
            try:
                yield
            finally:
                self._kept = None

    def _open(self, path: Path) -> AbstractContextManager[Any]:
        if self._kept is None:  # Closing gives back the mapped pages; a slice is a view of them.
            return safe_open(path, framework="pt")
        files, handles = self._kept
        if path not in handles:
            handles[path] = files.enter_context(safe_open(path, framework="pt"))
        return nullcontext(handles[path])

    def get(self, name: str) -> Tensor:
        """One tensor; the file is mapped for as long as the tensor lives."""
        path = self.folder / self.tensors[name].file
        try:
            with self._open(path) as file:
                return _bytes(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"cannot read {name!r} from {path}: {error}") from error

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor, in memory of their own; the rest of the file is not read."""
        return self._slice(name, lambda view: _bytes(view[rows]).clone())

    def read_columns(self, name: str, columns: slice) -> Tensor:
        """Columns of a matrix, transposed: (columns, rows), in memory of their own."""
        # Copied before it is turned: torch turns a contiguous matrix in blocks, twice as fast.
        return (
            self._slice(name, lambda view: _bytes(view[:, columns]).clone(memory_format=torch.contiguous_format))
            .t()
            .contiguous()
        )

    def _slice(self, name: str, take: Callable[[Any], Tensor]) -> Tensor:
        path = self.folder / self.tensors[name].file
        try:
            with self._open(path) as file:
                return take(file.get_slice(name))
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"cannot read {name!r} from {path}: {error}") from error

    def check_finite(self, name: str, values: Tensor) -> None:
        """Of what was read of a tensor.

        Raises:
            CorruptFileError: NaN or infinity among it; the tensor and its file are named.
        """
        if not is_finite(values):
            held = self.tensors.get(name) or self.tensors[name + PACKED]
            where = self.folder / held.file
            raise CorruptFileError(f"{where}: {name!r} holds NaN or Inf: the file is damaged, or its training diverged")

    def some_rows(self, starts: int, values: int) -> Iterator[tuple[str, Tensor]]:
        """Of every tensor by name, file by file: rows of about ``values`` values at evenly spread places."""
        for file in dict.fromkeys(info.file for info in self.tensors.values()):
            path = self.folder / file
            names = sorted(name for name, info in self.tensors.items() if info.file == file)
            try:
                with safe_open(path, framework="pt") as opened:
                    for name in names:
                        yield name, _spread(opened, name, self.tensors[name].shape, starts, values)
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"cannot read {path}: {error}") from error

    def sample(self, name: str) -> Tensor:
        """Evenly spaced values of a tensor; only their pages are read."""
        return spaced(self.get(name))


def _spread(opened: Any, name: str, shape: tuple[int, ...], starts: int, values: int) -> Tensor:
    if not shape:
        return _bytes(opened.get_tensor(name)).reshape(1).clone()
    view, total = opened.get_slice(name), shape[0]
    rows = max(1, values // max(1, math.prod(shape[1:])))
    places = sorted({number * max(0, total - rows) // max(1, starts - 1) for number in range(starts)})
    return torch.cat([_bytes(view[start : start + rows]).flatten() for start in places])


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype.is_floating_point and values.itemsize == 1 else values


def weight_key(checkpoint: TensorFiles, name: str) -> str:
    """The checkpoint's key of a parameter: its name, an older one (``renamed``), or without the ``model.`` in
    front, of a base model that was saved without its LM head. What the files hold may have :data:`PACKED` behind it.

    Raises:
        CorruptFileError: there is none.
    """
    for key in (name, checkpoint.renamed.get(name, name), name.removeprefix("model.")):
        if key in checkpoint.tensors or key + PACKED in checkpoint.tensors:
            return key
    raise CorruptFileError(f"{checkpoint.folder} has no tensor {name!r}: it is not a whole checkpoint of this model")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Twenty times as fast as ``isfinite``: both ends take a NaN over."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def spaced(tensor: Tensor) -> Tensor:
    """Some evenly spaced values of a tensor, a copy."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE_VALUES)].clone()


def digest(sample: Tensor, shape: tuple[int, ...]) -> str:
    """The same on every device and for every shard layout."""
    values = sample.float().cpu().contiguous()
    return hashlib.sha256(f"{shape}".encode() + values.numpy().tobytes()).hexdigest()[:32]
