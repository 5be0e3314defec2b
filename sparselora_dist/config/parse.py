"""Plain data to frozen dataclasses, recursive and type-checked: a refusal names dotted key, value and remedy."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union

from .files import ConfigError, show
from .overrides import apply_overrides

__all__ = [
    "ConfigError",
    "apply_overrides",
    "check_fields",
    "dump_dataclass",
    "nearest",
    "parse_dataclass",
    "refuse_code",
    "require",
    "show",
    "unknown_key",
]

T = TypeVar("T")

# Keys by which other tools let a config name code to import or run. None of them does anything here, so each is refused
# wherever it stands, also inside the blocks that are handed on verbatim (lora, engine.deepspeed).
_CODE_KEYS = {
    "trust_remote_code": "code that comes with a checkpoint is never executed here; remove the key, and use a "
    "model that transformers itself implements",
    "_target_": "a config holds values, never an import path; remove the key",
    "auto_map": "a config holds values, never an import path; remove the key",
    "py/object": "a config holds values, never an import path; remove the key",
}


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


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def require(ok: bool, path: str, value: object, allowed: str) -> None:
    """Raise ConfigError naming ``path``, ``value`` and what is ``allowed``, unless ``ok``."""
    if not ok:
        raise ConfigError(f"'{path}' is {show(value)}: allowed: {allowed}")


def refuse_code(data: object, path: str = "") -> None:
    """Refuse ``trust_remote_code``, ``_target_`` and their like anywhere in ``data``."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in _CODE_KEYS:
                raise ConfigError(f"'{join(path, key)}' is refused ({show(value)}): {_CODE_KEYS[key]}")
            refuse_code(value, join(path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            refuse_code(value, f"{path}[{index}]")


def field_keys(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Key in a config file -> field. The two differ only where a field's metadata says ``key``."""
    fields = dataclasses.fields(cls)
    return {field.metadata.get("key", field.name): field for field in fields}


def parse_dataclass(cls: type[T], data: dict[str, Any], path: str) -> T:
    """Build ``cls`` from ``data``, the object found at the dotted ``path`` ("" is the whole file).

    Types are those of the annotations: a bool is no int, an int serves as a float, ``X | None``, ``Literal``, ``list``,
    ``dict`` and nested dataclasses are followed. A nested class with a ``from_dict`` of its own is built by that.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"'{path or 'the config'}' is {show(data)}: expected an object of keys and values")
    hints = typing.get_type_hints(cls)
    known = field_keys(cls)
    for key in data:
        if key not in known:
            raise unknown_key(path, key, known)
    values: dict[str, Any] = {}
    for key, field in known.items():
        hint, at = hints[field.name], join(path, key)
        if key in data:
            values[field.name] = coerce(hint, data[key], at)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if not dataclasses.is_dataclass(hint):
                raise ConfigError(f"missing key '{at}': expected {describe(hint)}")
            values[field.name] = coerce(hint, {}, at)  # names the first key that the missing section needs
    return cls(**values)


def check_fields(config: Any, path: str) -> None:
    """Type-check a dataclass built by hand as a parsed one is; its dicts and lists become copies of its own."""
    hints = typing.get_type_hints(type(config))
    for key, field in field_keys(type(config)).items():
        value = coerce(hints[field.name], getattr(config, field.name), join(path, key))
        object.__setattr__(config, field.name, value)


def dump_dataclass(config: Any) -> dict[str, Any]:
    """The inverse of ``parse_dataclass``: plain JSON data; an alias field that is None is left out."""
    out: dict[str, Any] = {}
    for key, field in field_keys(type(config)).items():
        value = getattr(config, field.name)
        if key == field.name or value is not None:
            if dataclasses.is_dataclass(value):
                dump = getattr(value, "to_dict", None)
                out[key] = dump() if dump else dump_dataclass(value)
            else:
                out[key] = copy.deepcopy(value)
    return out


def coerce(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the annotation ``hint`` wants it, or ConfigError."""
    if hint is Any:
        return _plain(value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union or origin is types.UnionType:
        return _coerce_union(hint, args, value, path)
    if not _fits(hint, value) and not (hint is float and _fits(int, value)):
        raise _wrong_type(hint, value, path)
    if hint is float:
        require(math.isfinite(value), path, value, "finite numbers")
        return float(value)
    if origin is list:
        return [coerce(args[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return {_string_key(key, path): coerce(args[1], item, join(path, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        build = getattr(hint, "from_dict", None)
        return build(value) if build else parse_dataclass(typing.cast(type, hint), value, path)
    return value


def _plain(value: Any, path: str) -> Any:
    """A copy of a verbatim value: any JSON data, its numbers finite."""
    if isinstance(value, dict):
        return {_string_key(key, path): _plain(item, join(path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        require(math.isfinite(value), path, value, "finite numbers")
    return copy.deepcopy(value)


def _coerce_union(hint: Any, args: tuple[Any, ...], value: Any, path: str) -> Any:
    for arg in args:
        if _fits(arg, value):
            return coerce(arg, value, path)
    if float in args and _fits(int, value):
        return coerce(float, value, path)
    raise _wrong_type(hint, value, path)


def _fits(hint: Any, value: Any) -> bool:
    """Whether ``value`` has the outer type that ``hint`` asks for; what is inside is checked afterwards."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (dict, typing.cast(type, hint)))
    kind = origin or hint
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _string_key(key: object, path: str) -> str:
    """YAML reads the key 5 as a number; JSON has it as "5". Both mean the same here."""
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise ConfigError(f"'{path}' has the key {show(key)}: keys are strings; put it in quotes")


def describe(hint: Any) -> str:
    """An annotation in words, for messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union or origin is types.UnionType:
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(show(arg) for arg in args)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    return words.get(hint) or {list: "a list", dict: "an object"}.get(origin or hint) or "an object"


def _wrong_type(hint: Any, value: Any, path: str) -> ConfigError:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    remedy = ""
    if isinstance(value, str):
        choices = [arg for part in parts if typing.get_origin(part) is Literal for arg in typing.get_args(part)]
        near = nearest(value, [arg for arg in choices if isinstance(arg, str)])
        if near:
            remedy = f"; did you mean {show(near)}?"
        elif bool in parts and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            remedy = f"; write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
        elif value.lower() in ("none", "null") and type(None) in parts:
            remedy = "; write null, without quotes"
        elif (int in parts or float in parts) and _is_number(value):
            remedy = f"; write {show(float(value) if float in parts else int(float(value)))}, without quotes"
    elif str in parts and isinstance(value, (int, float)):
        remedy = f"; put it in quotes: {show(show(value))}"
    elif int in parts and isinstance(value, float) and value.is_integer():
        remedy = f"; write {int(value)}"
    return ConfigError(f"'{path}' is {show(value)}: expected {describe(hint)}{remedy}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
