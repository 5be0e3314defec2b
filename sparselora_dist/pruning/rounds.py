"""The record of the rounds, ``losa.json``: what was asked, and what each round has chosen and reached."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..config import ConfigError
from ..io.manifest import publish
from ..io.model_folder import write_json
from ..io.shard_files import read_json
from ..sync.everyone import everyone

RECORD = "losa.json"
T = TypeVar("T")


class Rounds:
    """The same on all ranks; rank 0 reads and writes the file.

    Args:
        output: the folder; the last round lies in it, the others in folders of their own.
        asked: in words; a folder that is there must have been begun with the same.
        count: rounds.
        main: whether this is rank 0.
    """

    def __init__(self, output: Path, asked: dict[str, Any], count: int, main: bool) -> None:
        self.output, self.asked, self.count, self.main = output, asked, count, main
        self._record: dict[str, Any] = {}

    def begin(self) -> None:
        """Raises:
        ConfigError: the folder was begun with something else.
        FileExistsError: it holds all rounds, or something else.
        """
        self._record = self.on_main(self._read)

    def _read(self) -> dict[str, Any]:
        file = self.output / RECORD
        if not file.is_file():
            if self.output.exists() and any(self.output.iterdir()):
                raise FileExistsError(f"{self.output} exists already, without {RECORD}: choose another --output")
            self.output.mkdir(parents=True, exist_ok=True)
            return {"version": version("sparselora-dist"), "asked": self.asked, "rounds": {}}
        record = read_json(file)
        begun = record["asked"]
        if different := [key for key in {**self.asked, **begun} if begun.get(key) != self.asked.get(key)]:
            key = different[0]
            raise ConfigError(
                f"{self.output} was begun with {key} {begun.get(key)!r}, not {self.asked.get(key)!r}: give what it was "
                "begun with to go on, or choose another --output"
            )
        if "trained" in record["rounds"].get(str(self.count), {}):
            raise FileExistsError(f"{self.output} holds all {self.count} rounds: choose another --output, or remove it")
        return record

    def folder(self, number: int) -> Path:
        """Of a round: its ``model``, its ``run``, and the adapter that it ``start``s from."""
        return self.output if number == self.count else self.output / f"round-{number}"

    def entry(self, number: int) -> dict[str, Any]:
        """What is noted of a round."""
        return self._record["rounds"].get(str(number), {})

    def note(self, number: int, **values: Any) -> None:
        """Of a round; every rank notes the same."""
        self._record["rounds"].setdefault(str(number), {}).update(values)
        if self.main:
            temporary = self.output / f".{RECORD}.tmp"
            write_json(self._record, temporary)
            publish(temporary, self.output / RECORD)

    def record(self) -> dict[str, Any]:
        return self._record

    def on_main(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of it, on all ranks; its error too. A collective."""
        error: Exception | None = None
        value: Any = None
        if self.main:
            try:
                value = work()
            except (ValueError, OSError) as raised:
                error = raised
        if dist.is_initialized() and dist.get_world_size() > 1:
            told = everyone((value, str(error) if error else None))[0]
            if not self.main and told[1] is not None:
                raise ConfigError(told[1])
            value = told[0]
        if error:
            raise error
        return value
