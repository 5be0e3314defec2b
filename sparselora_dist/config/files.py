"""Reading JSON and YAML config files strictly: every error names the file and the place in it."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from .errors import ConfigError, show

SUFFIXES = (".json", ".yaml", ".yml")

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*|[{}\[\]]')
_AFTER_KEY = re.compile(r"\s*:")


def load_file(path: str | os.PathLike[str], suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Any]:
    """The object in a file whose name ends in one of ``suffixes``."""
    name = os.fspath(path)
    if not name.lower().endswith(suffixes):
        *most, last = suffixes
        names = f"{', '.join(most)} or {last}" if most else last
        raise ConfigError(f"config file '{name}': a name that ends in {names} is expected")
    try:
        with open(name, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"config file '{name}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file '{name}' is not UTF-8 text: byte {error.start} is not part of a character"
        ) from error
    data = parse_json(text, name) if name.lower().endswith(".json") else parse_yaml(text, name)
    if not isinstance(data, dict):
        raise ConfigError(f"config file '{name}' holds {show(data)}: expected an object of keys and values")
    return data


def parse_json(text: str, source: str) -> Any:
    """JSON without its Python extras: duplicate keys, NaN and Infinity are refused with their line and column."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not JSON that can be read: {error}") from error
    _refuse_extras(text, source)
    return data


def _refuse_extras(text: str, source: str) -> None:
    """``json`` keeps the last of two equal keys and accepts NaN, and gives no place: scan valid text once more."""
    seen: list[set[str]] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token[0] in "{[":
            seen.append(set())
        elif token[0] in "}]":
            seen.pop()
        elif token[0] == '"':
            if not _AFTER_KEY.match(text, match.end()):
                continue
            key = json.loads(token)
            if key in seen[-1]:
                raise ConfigError(f"{source}: {_place(text, match.start())}: the key '{key}' is given twice; keep one")
            seen[-1].add(key)
        elif token == "NaN" or not math.isfinite(float(token)):
            raise ConfigError(f"{source}: {_place(text, match.start())}: {token} is refused: allowed: finite numbers")


def _place(text: str, offset: int) -> str:
    line_start = text.rfind("\n", 0, offset) + 1
    return f"line {text.count(chr(10), 0, offset) + 1}, column {offset - line_start + 1}"


def parse_yaml(text: str, source: str) -> Any:
    """YAML by the safe loader: tags that would build objects are refused, and so are duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        place = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                        raise ConfigError(f"{source}: {place}: the key '{key.value}' is given twice; keep one")
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{source}: {where}not plain YAML: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML that can be read: {error}") from error
