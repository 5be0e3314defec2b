"""``--section.key value`` words on a command line, laid over the data of a config file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError, show
from .files import parse_json


def apply_overrides(data: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with ``--section.key value`` and ``--section.key=value`` applied in order.

    A value is JSON where it parses as JSON (``true``, ``1e-3``, ``[1, 2]``, ``{"3-30": 0.99}``), else a string. Keys
    may be as deep as the data; missing objects on the way are made; an object replaces the one that was there.
    """
    out = copy.deepcopy(data)
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, text = word.partition("=")
        if not name.startswith("--"):
            raise ConfigError(
                f"override {show(word)} is not understood: write --section.key value or --section.key=value"
            )
        keys = name[2:].split(".")
        if len(keys) < 2 or not all(keys):
            raise ConfigError(f"override '{name}' names no key of a section: write --section.key value")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"override '{name}' has no value: write {name} value or {name}=value")
            text = words.pop(0)
        _assign(out, keys, _override_value(name, text), name)
    return out


def _override_value(name: str, text: str) -> Any:
    if text[:1] in ("{", "["):
        return parse_json(text, f"override '{name}'")
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"override '{name}' is {text}: allowed: finite numbers")
    return value


def _assign(data: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        if data.get(key) is None:
            data[key] = {}
        if not isinstance(data[key], dict):
            held = ".".join(keys[: depth + 1])
            raise ConfigError(
                f"override '{name}' cannot be applied: '{held}' is {show(data[key])}, which has no keys; "
                f"write the object itself there instead"
            )
        data = data[key]
    data[keys[-1]] = value
