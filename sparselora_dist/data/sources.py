"""Where rows come from: a JSON file, a folder saved by `datasets.save_to_disk`, or a Hugging Face dataset name.

Only data is ever read: JSON by the standard library, Arrow by `datasets`. Nothing is unpickled and no dataset script
is run, so a hostile file can at worst be refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_SUFFIXES = (".jsonl", ".json")
_BOM = b"\xef\xbb\xbf"


def iterate_rows(source: str, split: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of every row of `source`; `where` names file and line, or dataset and row from 1.

    Args:
        source: "*.jsonl" or "*.json" file, folder, or dataset name; the latter two may end in ":split".
        split: taken when the source has splits and names none.
        key: the configuration key that gave the source, for error messages.

    Raises:
        FileNotFoundError: nothing by that name; the message names `source` and `key`.
        ValueError: an unsupported file, a missing split, or broken JSON (named as file:line).
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in JSON_SUFFIXES:
            raise ValueError(f"{key}: {source} has the suffix {path.suffix!r}; accepted: {', '.join(JSON_SUFFIXES)}")
        return _json_rows(path)
    if path.is_dir():
        return _arrow_rows(_open_saved(path, split, key), source)
    name, _, wanted = source.partition(":")
    folder = Path(name).expanduser()
    if wanted and folder.is_dir():
        return _arrow_rows(_open_saved(folder, wanted, key), source)
    if not name or path.suffix in JSON_SUFFIXES or name[0] in "/.~" or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"{source} does not exist (set by {key}; relative paths start at {Path.cwd()})")
    return _arrow_rows(_open_named(name, wanted or split, key), source)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON object per line, or one JSON list; blank lines are skipped, line numbers start at 1."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
        if head.startswith(b"["):
            file.seek(0)
            rows = _parse(file.read().removeprefix(_BOM), path)
            for number, row in enumerate(rows, start=1):
                yield f"{path}: row {number}", row
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                # Without the line end: an object broken off at it would be reported one line too low.
                yield f"{path}:{number}", _parse(line.rstrip(), path, number)


def _parse(data: bytes, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno}); "
            "expected one JSON object per line, or one list of objects"
        ) from error
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line}: not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:  # endless digits, bottomless nesting
        raise ValueError(f"{path}:{first_line}: refused JSON: {error}") from error


def _arrow_rows(dataset: Any, source: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(dataset, start=1):
        yield f"{source}: row {number}", row


def _open_saved(path: Path, split: str, key: str) -> Any:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"{key}: the folder {path} was not saved by datasets.save_to_disk; give it such a folder, "
            "or a .jsonl or .json file"
        )
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{key}: {path} has no split {split!r}; it has: {', '.join(loaded)}")
    return loaded[split]


def _open_named(name: str, split: str, key: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name} (set by {key}) is neither a file or folder under {Path.cwd()} nor a dataset that could be "
            f"loaded from the Hugging Face hub: {error}"
        ) from error
