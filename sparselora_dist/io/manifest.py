"""Hashes and atomic publishing: the one place that knows how a file is guarded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ConfigError

_CHUNK = 1 << 24


class CorruptFileError(ValueError):
    """A file is truncated, altered, or not what it says it is."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: a swapped, missing or altered tensor changes it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Never unpickles.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: truncated, or not safetensors; the file is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is truncated or not a safetensors file ({error}). Pickle files are never loaded"
        ) from error


@contextlib.contextmanager
def saving(path: Path, size: int) -> Iterator[None]:
    """Around what writes ``path``, of ``size`` bytes: safetensors' own error is no OSError, and neither names the path.

    Raises:
        OSError: the disk is full or not writable, with the path, the bytes needed and the bytes that are free.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        found = re.search(r"os error (\d+)", str(error))
        if number is None and found is None:
            raise  # Not the system's: what was to be saved is wrong.
        number = int(found[1]) if number is None and found else number
        why = os.strerror(number) if number else str(error)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        raise OSError(
            number, f"could not save {path}: {why} (it needs {size:,} bytes, and {free:,} are free there)"
        ) from error


def share(path: Path) -> None:
    """Give a file the permissions that the umask asks for: safetensors writes its files for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def publish(temporary: Path, final: Path) -> None:
    """Make ``temporary`` (a file or a folder, already written) appear as ``final``, whole or not at all."""
    for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        if path.is_file():
            share(path)
        _fsync(path)
    os.replace(temporary, final)
    _fsync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def make_writable(folder: Path, key: str) -> None:
    """Make a folder, if need be, and prove that a file can be made in it.

    Raises:
        ConfigError: it cannot; names the key, the folder and what the system says.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        why = "it is a file" if isinstance(error, FileExistsError) else f"{error.strerror or error}{where}"
        raise ConfigError(f"'{key}' is {folder}, where nothing can be written: {why}. Name another folder") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
