"""Reading JSON and YAML config files strictly: every error names the file and the place in it."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

__all__ = ["ConfigError", "load_file", "parse_json", "parse_yaml", "show"]

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN|-?[0-9][0-9.eE+-]*|[{}\[\]]')
_AFTER_KEY = re.compile(r"\s*:")


class ConfigError(ValueError):
    """A config that cannot be used. The message names the key or file, the value, and what would be right."""


def show(value: object) -> str:
    """A value as the user wrote it in JSON, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def load_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a ``.json``, ``.yaml`` or ``.yml`` file."""
    name = os.fspath(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"config file '{name}': a name that ends in .json, .yaml or .yml is expected")
    try:
        with open(name, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"config file '{name}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file '{name}' is not UTF-8 text: byte {error.start} is not part of a character"
        ) from error
    data = parse_json(text, name) if suffix == ".json" else parse_yaml(text, name)
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

    try:
        _refuse_yaml_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), source, set())
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}: {where}not plain YAML: {problem}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            str(error) if isinstance(error, ConfigError) else f"{source}: not YAML that can be read: {error}"
        ) from error


def _refuse_yaml_duplicates(node: Any, source: str, done: set[int]) -> None:
    import yaml

    if id(node) in done:  # an alias points at a node that was looked at already
        return
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_yaml_duplicates(item, source, done)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[tuple[str, str]] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = (key.tag, key.value)
            if name in seen:
                mark = key.start_mark
                where = f"line {mark.line + 1}, column {mark.column + 1}"
                raise ConfigError(f"{source}: {where}: the key '{key.value}' is given twice; keep one")
            seen.add(name)
        _refuse_yaml_duplicates(value, source, done)
