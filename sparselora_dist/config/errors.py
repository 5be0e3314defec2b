"""What a refusal says: the dotted key, the value as JSON, and what would be right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config that cannot be used. The message names the key or file, the value, and what would be right."""


def show(value: object) -> str:
    """A value as the user wrote it in JSON, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``key``, or None where nothing is close."""
    names = list(known)
    plain = {name.lower().replace("-", "_"): name for name in names}
    found = difflib.get_close_matches(key.lower().replace("-", "_"), plain, n=1, cutoff=0.45)
    if found:
        return plain[found[0]]
    # "lr" or "steps" are too short for the ratio, but lie inside the names they stand for.
    return next((name for name in names if len(key) > 2 and key.lower() in name.lower()), None)


def unknown_key(path: str, key: object, known: Iterable[str]) -> ConfigError:
    """The error for a key that nothing reads: its dotted name, the nearest known key, and all known ones."""
    names = sorted(known)
    near = nearest(str(key), names)
    hint = f"did you mean '{near}'? " if near else ""
    return ConfigError(f"unknown key '{join(path, key)}': {hint}known: {', '.join(names)}")


def require(ok: bool, path: str, value: object, allowed: str) -> None:
    """Raise ConfigError naming ``path``, ``value`` and what is ``allowed``, unless ``ok``."""
    if not ok:
        raise ConfigError(f"'{path}' is {show(value)}: allowed: {allowed}")
