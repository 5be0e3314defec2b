"""pydantic's ``ValidationError`` as a ``ConfigError``: what is expected is read from the annotation that refused."""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any, Literal, Union

import annotated_types
from pydantic import ValidationError
from typing_extensions import is_typeddict

from .errors import ConfigError, join, nearest, show, unknown_key
from .limits import ALLOWED, Says

__all__ = ["explain", "keys_of"]

# pydantic's names of errors: a key that no field has, and a value of the right type that breaks a bound.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "string_too_short", "too_short"}

# The rest of an error's place below the annotation at hand, and the error.
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
    if not any(loc for loc, _ in faults):
        return _refusal(hint, path, [fault for _, fault in faults])
    arms = [arm for arm in _arms(hint) if arm is not type(None)]
    if len(arms) > 1:
        # Every arm of a union has refused, in order, under a name of its own. The one that got further is meant.
        tried: dict[Any, list[_Fault]] = {}
        for loc, fault in faults:
            tried.setdefault(loc[0], []).append((loc[1:], fault))
        furthest = max(range(len(tried)), key=lambda index: len(list(tried.values())[index][0][0]))
        below = list(tried.values())[furthest]
        if not any(loc for loc, _ in below) or ALLOWED in _marks(hint):
            return _refusal(hint, path, [fault for loc, fault in faults if len(loc) == 1])
        return _explain(arms[furthest], path, below)
    inner = _bare(arms[0])
    known = keys_of(inner)
    loc, fault = next((item for item in faults if len(item[0]) == 1 and item[1]["type"] in _UNKNOWN), faults[0])
    key, at = loc[0], join(path, loc[0])
    if known is None:
        args = typing.get_args(inner)
        at = f"{path}[{key}]" if isinstance(key, int) else at
        return _explain(args[-1], at, [(loc[1:], fault) for loc, fault in faults if loc[0] == key])
    if len(loc) == 1 and fault["type"] in _UNKNOWN:
        elsewhere = getattr(inner, "elsewhere", lambda _: None)(key)
        return ConfigError(f"unknown key '{at}'{elsewhere}") if elsewhere else unknown_key(path, key, known)
    if fault["type"] == "missing":
        return _missing(known[key], at)
    return _explain(known[key], at, [(loc[1:], fault) for loc, fault in faults if loc[0] == key])


def _missing(hint: Any, path: str) -> ConfigError:
    """The error for a key that must be there; of a whole section, its first such key."""
    for name, field in getattr(_bare(hint), "__pydantic_fields__", {}).items():
        if field.is_required():
            return _missing(typing.get_type_hints(_bare(hint), include_extras=True)[name], join(path, name))
    return ConfigError(f"missing key '{path}': expected {_expected(hint)}")


def _refusal(hint: Any, path: str, faults: list[Any]) -> ConfigError:
    fault, value = faults[0], faults[0]["input"]
    own = fault.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # raised by a check of ours, with all its words
        return own
    at = f"'{path or 'the config'}' is"
    kinds = {fault["type"] for fault in faults}
    if "finite_number" in kinds:
        return ConfigError(f"{at} {show(value)}: allowed: finite numbers")
    if kinds & _BOUNDS or ALLOWED in _marks(hint):
        bare = [_bare(arm) for arm in _arms(hint)]
        if isinstance(value, int) and float in bare and int not in bare and bool not in bare:
            value = float(value)
        near = _nearest_choice(bare, value)
        return ConfigError(f"{at} {show(value)}: allowed: {_allowed(hint)}" + (f"; did you mean '{near}'?" if near else ""))
    if all(kind == "literal_error" or kind.endswith("_type") for kind in kinds):
        return ConfigError(f"{at} {show(value)}: expected {_expected(hint)}{_remedy(hint, value)}")
    return ConfigError(f"{at} {show(value)}: {fault['msg']}")


# Annotations


def _marks(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _bare(hint: Any) -> Any:
    """``hint`` without its ``Annotated``."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _arms(hint: Any) -> tuple[Any, ...]:
    """What a union offers; any other annotation alone."""
    bare = _bare(hint)
    return typing.get_args(bare) if typing.get_origin(bare) in (Union, types.UnionType) else (hint,)


def _expected(hint: Any) -> str:
    """The types of an annotation in words."""
    arms = _arms(hint)
    if len(arms) > 1:
        return " or ".join(map(_expected, arms))
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return "one of " + ", ".join(map(show, typing.get_args(bare)))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    return words.get(bare) or ("a list" if typing.get_origin(bare) is list else "an object of keys and values")


def _allowed(hint: Any) -> str:
    """The values of an annotation in words: its own, or those of its bounds."""
    for mark in _marks(hint):
        if isinstance(mark, Says):
            return mark.words
    arms = _arms(hint)
    if len(arms) > 1:
        return ", or ".join(map(_allowed, arms))
    bare, args = _bare(hint), typing.get_args(_bare(hint))
    if typing.get_origin(bare) is Literal:
        return show(args[0]) if len(args) == 1 else ", ".join(map(str, args))
    if bare not in (int, float):
        return "true, false" if bare is bool else _expected(hint)
    low = high = None
    for mark in _marks(hint):
        if isinstance(mark, (annotated_types.Ge, annotated_types.Gt)):
            low = mark
        elif isinstance(mark, (annotated_types.Le, annotated_types.Lt)):
            high = mark
    kind = "integers" if bare is int else "numbers"
    if low is None:
        return kind
    if high is None:
        return f"{kind} from {low.ge}" if isinstance(low, annotated_types.Ge) else f"{kind} above {low.gt}"
    left = f"[{low.ge}" if isinstance(low, annotated_types.Ge) else f"({low.gt}"
    right = f"{high.le}]" if isinstance(high, annotated_types.Le) else f"{high.lt})"
    return f"{kind} in {left}, {right}"


def _nearest_choice(bare: list[Any], value: Any) -> str | None:
    """The name that was meant, of a Literal or a list of them."""
    names = {name for arm in bare if typing.get_origin(arm) is Literal for name in typing.get_args(arm)}
    texts = [name for name in names if isinstance(name, str)]
    given = value if isinstance(value, list) else [value]
    wrong = next((item for item in given if isinstance(item, str) and item not in names), None)
    return nearest(wrong, sorted(texts)) if wrong else None


def _remedy(hint: Any, value: Any) -> str:
    """How to write what was probably meant, or nothing."""
    bare = [_bare(arm) for arm in _arms(hint)]
    near = _nearest_choice(bare, value)
    if near:
        return f"; did you mean {show(near)}?"
    if isinstance(value, str):
        if bool in bare and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return f"; write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
        if value.lower() in ("none", "null") and type(None) in bare:
            return "; write null, without quotes"
        if (int in bare or float in bare) and _is_number(value):
            return f"; write {show(float(value) if float in bare else int(float(value)))}, without quotes"
    elif str in bare and isinstance(value, (int, float)):
        return f"; put it in quotes: {show(show(value))}"
    elif int in bare and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
