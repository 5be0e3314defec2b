"""How a section is made: a frozen pydantic dataclass, built by hand or from plain data, refused in our words."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pydantic
from typing_extensions import dataclass_transform

from .errors import ConfigError, join, require, show
from .explain import explain

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

# A bool is no int and "4" no number (an int serves as a float); a docstring under a field is its description.
CONFIG = pydantic.ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, use_attribute_docstrings=True
)

_NO_IMPORT = "a config holds values, never an import path; remove the key"
# Keys by which other tools let a config name code to import or run. None of them does anything here, so each is refused
# wherever it stands, also inside the blocks that are handed on verbatim (lora, engine.deepspeed).
_CODE_KEYS = {
    "trust_remote_code": "code that comes with a checkpoint is never executed here; remove the key, and use a "
    "model that transformers itself implements",
    "_target_": _NO_IMPORT,
    "auto_map": _NO_IMPORT,
    "py/object": _NO_IMPORT,
}


class Section:
    """Base of all sections. A key is a field with its docstring and its constraint, and nothing else.

    A classmethod ``elsewhere`` may have more to say about a key that is not the section's than which one is near.
    """

    __slots__ = ()
    PATH: ClassVar[str] = ""
    """Where the section stands in a run file."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From the section's keys; a ConfigError names what is wrong."""
        return parse(cls, data, cls.PATH)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data that ``from_dict`` reads back to an equal config, defaults written out."""
        return pydantic.TypeAdapter(type(self)).dump_python(self, mode="json", by_alias=True)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def section(cls: type[T]) -> type[T]:
    """Make a ``Section`` of a class with annotated fields. Its constructor copies what it is given and checks it."""
    built: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, slots=True, config=CONFIG)(cls)
    validate = built.__init__

    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:
        given = own(values, self.PATH)
        try:
            validate(self, **given)
        except pydantic.ValidationError as error:
            raise explain(error, type(self), self.PATH) from None
        _refuse_infinite(given, self.PATH)

    built.__init__ = __init__
    return built


def parse(kind: type[T], data: Any, path: str) -> T:
    """A section or TypedDict from ``data``, the object found at the dotted ``path`` ("" is the whole file)."""
    given = own(data, path)
    try:
        # As JSON, where an object is a section and the names are those of a file.
        built: T = pydantic.TypeAdapter(kind).validate_json(
            json.dumps(given, default=Section.to_dict), by_alias=True, by_name=False
        )
    except pydantic.ValidationError as error:
        raise explain(error, kind, path) from None
    _refuse_infinite(given, path)
    return built


def own(data: Any, path: str) -> Any:
    """A copy of ``data`` with string keys (YAML reads the key 5 as a number), none of which names code."""
    if isinstance(data, (list, tuple)):
        return [own(value, f"{path}[{index}]") for index, value in enumerate(data)]
    if not isinstance(data, dict):
        if not isinstance(data, (str, int, float, Section, type(None))):
            raise ConfigError(f"'{path}' is {show(data)}: expected JSON data")
        return data
    out = {}
    for key, value in data.items():
        if key in _CODE_KEYS:
            raise ConfigError(f"'{join(path, key)}' is refused ({show(value)}): {_CODE_KEYS[key]}")
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ConfigError(f"'{path}' has the key {show(key)}: keys are strings; put it in quotes")
        out[str(key)] = own(value, join(path, key))
    return out


def _refuse_infinite(data: Any, path: str) -> None:
    """After the sections' own checks: what they hand on verbatim is finite, too."""
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            _refuse_infinite(value, f"{path}[{key}]" if isinstance(data, list) else join(path, key))
    elif isinstance(data, float):
        require(math.isfinite(data), path, data, "finite numbers")
