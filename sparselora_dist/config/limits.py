"""Annotations that the sections share. pydantic checks the bounds, and a refusal puts them into words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

__all__ = [
    "ALLOWED",
    "AboveZero",
    "Auto",
    "BelowOne",
    "FromZero",
    "NonNegative",
    "Path",
    "Positive",
    "Says",
    "Share",
]


@dataclass(frozen=True)
class Says:
    """In an annotation: what a refusal calls allowed, where bounds do not say it well enough."""

    words: str


ALLOWED = object()
"""In an annotation: a value of the wrong type, too, is answered by what is allowed."""

Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
FromZero = Annotated[float, Ge(0)]
AboveZero = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Path = Annotated[str, MinLen(1), Says("a path")]
Auto = Literal["auto"]
