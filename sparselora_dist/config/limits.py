"""Annotations that the sections share: bounds that pydantic checks, and the words for them in a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen


@dataclass(frozen=True)
class Says:
    """In an annotation: what a refusal calls allowed. The last one counts."""

    words: str


ALLOWED = object()
"""In an annotation: a value of the wrong type is answered by what is allowed, too, not by the type alone."""

Positive = Annotated[int, Ge(1), Says("integers from 1")]
NonNegative = Annotated[int, Ge(0), Says("integers from 0")]
FromZero = Annotated[float, Ge(0), Says("numbers from 0")]
AboveZero = Annotated[float, Gt(0), Says("numbers above 0")]
Share = Annotated[float, Ge(0), Le(1), Says("numbers in [0, 1]")]
BelowOne = Annotated[float, Ge(0), Lt(1), Says("numbers in [0, 1)")]
Path = Annotated[str, MinLen(1), Says("a path")]
Auto = Literal["auto"]
