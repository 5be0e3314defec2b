"""pydantic's ``ValidationError`` as a ``ConfigError``: what is expected is read from the annotation that refused."""

from __future__ import annotations

import json
import types
import typing
from typing import Annotated, Any, Literal, Union

from pydantic import ValidationError
from typing_extensions import is_typeddict

from .errors import ConfigError, join, nearest, show, unknown_key
from .limits import ALLOWED, Says

# pydantic's names of errors: a key that no field has; a value of another type (the others break a bound).
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_TYPE = ("literal_error", "_type")
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}

# What is left of an error's place below the annotation at hand, and the error.
_Fault = tuple[tuple[Any, ...], Any]


def explain(error: ValidationError, hint: Any, path: str) -> ConfigError:
    """The first thing that is wrong with a value of type ``hint`` at the dotted ``path``; unknown keys come first."""
    return _explain(hint, path, [(fault["loc"], fault) for fault in error.errors(include_url=False)])


def keys_of(hint: Any) -> dict[str, Any] | None:
    """Key in a file -> annotation, of a section or a TypedDict; None for any other type."""
    fields = getattr(hint, "__pydantic_fields__", None)
    if fields is None and not is_typeddict(hint):
        return None
    hints = typing.get_type_hints(hint, include_extras=True)
    return {field.alias or name: hints[name] for name, field in fields.items()} if fields else hints


def _explain(hint: Any, path: str, faults: list[_Fault]) -> ConfigError:
    arms = [arm for arm in _arms(hint) if arm is not type(None)]
    if len(arms) > 1:
        # Every arm of a union has refused, in order, under a name of its own. The one that got further is meant.
        tried: dict[Any, list[_Fault]] = {}
        for loc, fault in faults:
            tried.setdefault(loc[0] if loc else "", []).append((loc[1:], fault))
        arm, below = max(zip(arms, tried.values()), key=lambda item: len(item[1][0][0]))
        if below[0][0] and ALLOWED not in _split(hint)[1]:
            return _explain(arm, path, below)
        return _refusal(hint, path, [fault for loc, fault in faults if len(loc) < 2])
    if not faults[0][0]:
        return _refusal(hint, path, [fault for _, fault in faults])
    inner = _split(arms[0])[0]
    known = keys_of(inner)
    loc, fault = next((item for item in faults if len(item[0]) == 1 and item[1]["type"] in _UNKNOWN), faults[0])
    key = loc[0]
    at = f"{path}[{key}]" if isinstance(key, int) else join(path, key)
    if known is not None and len(loc) == 1 and fault["type"] in _UNKNOWN:
        elsewhere = getattr(inner, "elsewhere", lambda _: None)(key)
        return ConfigError(f"unknown key '{at}'{elsewhere}") if elsewhere else unknown_key(path, key, known)
    hint = known[key] if known is not None else typing.get_args(inner)[-1]
    if len(loc) == 1 and fault["type"] == "missing":
        return _missing(hint, at)
    return _explain(hint, at, [(loc[1:], fault) for loc, fault in faults if loc[0] == key])


def _missing(hint: Any, path: str) -> ConfigError:
    """The error for a key that must be there; of a whole section, its first such key."""
    for key, below in (keys_of(hint) or {}).items():
        if hint.__pydantic_fields__[key].is_required():
            return _missing(below, join(path, key))
    return ConfigError(f"missing key '{path}': expected {_words(hint, False)}")


def _refusal(hint: Any, path: str, faults: list[Any]) -> ConfigError:
    fault, value, kinds = faults[0], faults[0]["input"], {fault["type"] for fault in faults}
    own = fault.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # raised by a check of ours, with all its words
        return own
    arms = [_split(arm)[0] for arm in _arms(hint)]
    choices = [name for arm in arms if typing.get_origin(arm) is Literal for name in typing.get_args(arm)]
    given = value if isinstance(value, list) else [value]
    wrong = next((item for item in given if isinstance(item, str) and item not in choices), None)
    near = nearest(wrong, [name for name in choices if isinstance(name, str)]) if wrong else None
    at = f"'{path or 'the config'}' is"
    if "finite_number" in kinds:
        return ConfigError(f"{at} {show(value)}: allowed: finite numbers")
    if ALLOWED not in _split(hint)[1] and all(kind.endswith(_TYPE) for kind in kinds):
        remedy = f"; did you mean {show(near)}?" if near else _remedy(arms, value)
        # By hand, a section is an object of its class.
        words = f"a {arms[0].__name__}" if "dataclass_exact_type" in kinds else _words(hint, False)
        return ConfigError(f"{at} {show(value)}: expected {words}{remedy}")
    if float in arms and int not in arms and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    words = str(own or (fault["msg"] if "json_invalid" in kinds else _words(hint, True))) + (
        f"; did you mean '{near}'?" if near else ""
    )
    return ConfigError(f"{at} {show(value)}: allowed: {words}")


def _remedy(arms: list[Any], value: Any) -> str:
    """How to write what was probably meant, or nothing."""
    if isinstance(value, str):
        try:
            meant = json.loads(value.lower().replace("none", "null"))
        except ValueError:
            return ""
        fits = type(meant) in arms or (type(meant) is int and float in arms)
        return f"; write {show(meant)}, without quotes" if fits else ""
    if str in arms and isinstance(value, (int, float)):
        return f"; put it in quotes: {show(show(value))}"
    return f"; write {int(value)}" if int in arms and isinstance(value, float) and value.is_integer() else ""


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation and what ``Annotated`` adds to it."""
    return (typing.get_args(hint)[0], typing.get_args(hint)[1:]) if typing.get_origin(hint) is Annotated else (hint, ())


def _arms(hint: Any) -> list[Any]:
    """What a union offers, unions in it included; any other annotation alone."""
    bare = _split(hint)[0]
    if typing.get_origin(bare) not in (Union, types.UnionType):
        return [hint]
    return [arm for part in typing.get_args(bare) for arm in _arms(part)]


def _words(hint: Any, bounds: bool) -> str:
    """An annotation in words: the types that are expected, or within ``bounds`` the values that are allowed."""
    bare, marks = _split(hint)
    said = [mark.words for mark in marks if bounds and isinstance(mark, Says)]
    if said:
        return said[-1]
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if origin in (Union, types.UnionType):
        return (", or " if bounds else " or ").join(_words(arg, bounds) for arg in args)
    if origin is Literal and len(args) > 1:
        return ", ".join(map(str, args)) if bounds else "one of " + ", ".join(map(show, args))
    if origin is Literal:
        return show(args[0])
    if bounds and bare is bool:
        return "true, false"
    return _WORDS.get(bare) or ("a list" if origin is list else "an object of keys and values")
