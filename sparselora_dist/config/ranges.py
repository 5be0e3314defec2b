"""Compact layer ranges: ``{"14-19,21-23": 0.75}`` and the layers they stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from .errors import ConfigError, show

# Six digits: no model has more layers, and a longer number is a typing error that should not be expanded.
_PIECE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")

AUTO = "auto"
"""In the place of a range: every layer that can and that no other range names."""

# The same for an editor: an object of ranges and their sparsity.
RANGES_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": r"^auto$|^ *[0-9]{1,6}(-[0-9]{1,6})? *(, *[0-9]{1,6}(-[0-9]{1,6})? *)*$"},
    "additionalProperties": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
}


def _pieces(key: str, path: str) -> Iterator[tuple[int, int, str]]:
    """(first, last, as written) for each comma-separated piece of a range key."""
    for piece in key.split(","):
        match = _PIECE.fullmatch(piece.strip())
        if not match:
            raise ConfigError(
                f'\'{path}\' has the range {show(key)}: expected layer numbers such as "5", "3-30" or "14-19,21-23", '
                'or "auto"'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"'{path}' range '{piece.strip()}' is reversed: write '{last}-{first}'")
        yield first, last, piece.strip()


def check_ranges(ranges: Mapping[Any, Any], path: str) -> None:
    """Refuse what no model could use: a bad range, a layer named twice, a sparsity outside [0, 1)."""
    spans: list[tuple[int, int, str]] = []
    for key, value in ranges.items():
        if key != AUTO:
            spans += _pieces(str(key), path)  # YAML reads the key 5 as a number
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 <= value < 1:
            raise ConfigError(
                f"'{path}' range '{key}' has the sparsity {show(value)}: allowed: a number in [0, 1), "
                f"the share of channels left out (0 = dense, 0.99 = keep 1 %)"
            )
    spans.sort()
    for (_, last, left), (first, _, right) in pairwise(spans):
        if first <= last:
            raise ConfigError(f"'{path}' ranges '{left}' and '{right}' both name layer {first}: name each layer once")


def expand_ranges(ranges: Mapping[str, float], path: str = "layers") -> dict[int, float]:
    """``{"3-4,7": 0.9}`` -> ``{3: 0.9, 4: 0.9, 7: 0.9}``, in the order of the layers."""
    check_ranges(ranges, path)
    layers = {
        layer: float(value)
        for key, value in ranges.items()
        for first, last, _ in _pieces(key, path)
        for layer in range(first, last + 1)
    }
    return dict(sorted(layers.items()))


def resolve_ranges(
    ranges: Mapping[str, float], num_layers: int, path: str, able: Collection[int] | None = None
) -> dict[int, float]:
    """As ``expand_ranges``, for a model with ``num_layers`` layers: a range that it does not have is refused.

    ``able`` are the layers that ``"auto"`` stands for, by default all of them.
    """
    named = {key: value for key, value in ranges.items() if key != AUTO}
    for key in named:
        for first, last, piece in _pieces(key, path):
            what = "matches nothing" if first >= num_layers else "reaches beyond the last layer"
            if last >= num_layers:
                inside = f" (in '{key}')" if piece != key else ""
                raise ConfigError(f"'{path}' range '{piece}'{inside} {what}: the model has layers 0-{num_layers - 1}")
    layers = expand_ranges(named, path)
    if AUTO in ranges:
        automatic = range(num_layers) if able is None else able
        layers = dict.fromkeys(automatic, float(ranges[AUTO])) | layers
    return dict(sorted(layers.items()))


def compact_ranges(layers: Mapping[int, float]) -> dict[str, float]:
    """The inverse of ``expand_ranges``: ``{3: 0.9, 4: 0.9, 7: 0.9}`` -> ``{"3-4,7": 0.9}``, one key per sparsity."""
    runs: dict[float, list[list[int]]] = {}
    for layer, value in sorted(layers.items()):
        spans = runs.setdefault(value, [])
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    names = {value: [f"{a}-{b}" if b > a else str(a) for a, b in spans] for value, spans in runs.items()}
    return {",".join(pieces): value for value, pieces in names.items()}
