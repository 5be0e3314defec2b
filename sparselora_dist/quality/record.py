"""What was measured so far: an append-only file that a calibration goes on from, whoever killed it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..engines import Engine

FORMAT = "sparselora-calibration/1"
T = TypeVar("T")


def from_main(engine: Engine, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; what it raises, every rank raises. A collective."""
    box: list[Any] = [None, None]
    if engine.is_main:
        try:
            box[0] = make()
        except Exception as error:  # Whatever it is, the other ranks wait to hear of it.
            box[1] = error
    if engine.ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class Record:
    """Values by name, equal on all ranks; rank 0 keeps the file.

    Its first line says what was measured on; every further line is one value, written as soon as it is known. A line
    that a crash cut off is dropped.

    Args:
        path: the file.
        identity: what a value depends on, by name. Must equal the file's.
        engine: the ranks.

    Raises:
        ValueError: the file was measured on something else, which is named.
    """

    def __init__(self, path: Path, identity: dict[str, Any], engine: Engine) -> None:
        self.path, self.identity = path, {"format": FORMAT, **identity}
        self._main = engine.is_main
        self.values: dict[str, Any] = from_main(engine, self._open)

    def _open(self) -> dict[str, Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if not whole:
            self.path.write_bytes(b"")
            self._append(self.identity)
            return {}
        try:
            header, *rows = [json.loads(line) for line in whole]
            values = {row["measured"]: row["value"] for row in rows}
            self._check(header)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is not a record of a calibration ({error!r}): delete it") from error
        if len(whole) < len(lines):
            os.truncate(self.path, sum(map(len, whole)))
        return values

    def _check(self, header: dict[str, Any]) -> None:
        way_out = "Use another --output, or delete that file"
        if header.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a record of a calibration of this version. {way_out}")
        theirs, ours = header["model"], self.identity["model"]
        if header["model_sha256"] != self.identity["model_sha256"]:
            raise ValueError(
                f"{self.path} was measured on another model ({theirs}, {header['model_sha256'][:12]}), not on {ours} "
                f"({self.identity['model_sha256'][:12]}). {way_out}"
            )
        for key, value in self.identity.items():
            if key not in ("model", "data") and header.get(key) != value:
                raise ValueError(
                    f"{self.path} was measured with {key} {header.get(key)!r}, but this calibration has {value!r}. {way_out}"
                )

    def add(self, name: str, value: Any) -> None:
        """Keep a value that all ranks have."""
        self.values[name] = value
        if self._main:
            self._append({"measured": name, "value": value})

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
