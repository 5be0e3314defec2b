"""The picture of a calibration: layers across, sparsity upwards, one panel a group, the choice outlined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from .budget import Site

_NAMES = {"ffn": "FFN neurons", "qk": "query/key pairs", "vo": "value/output channels"}
# From nothing to the largest value: light to dark, so that it also reads in grey.
_STOPS = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_INK, _GRID, _MARK = (30, 30, 30), (225, 225, 225), (214, 39, 40)
_ROW, _LEFT, _RIGHT, _TOP, _GAP = 24, 90, 40, 118, 44
_STRIP = 16  # Height of the importance strip.


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """What is drawn."""

    groups: tuple[str, ...]
    levels: tuple[float, ...]
    layers: int
    values: Mapping[Site, Mapping[float, float]]
    chosen: Mapping[Site, float]
    """Level of every site that is sparse."""
    importance: list[float]
    unit: str
    """Of the values."""
    caption: tuple[str, ...]
    """Lines above the panels."""

    @property
    def cell(self) -> int:
        """Width of a layer, pixels."""
        return max(12, min(40, 1200 // self.layers))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, pixels."""
        panel = _ROW * len(self.levels) + _GAP
        return max(720, _LEFT + self.cell * self.layers + _RIGHT), _TOP + panel * len(self.groups) + _STRIP + 104


def check_drawable() -> None:
    """Refuse early what would fail at the end.

    Raises:
        ValueError: Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise ValueError(
            "the picture of a calibration needs Pillow, which is not installed: pip install 'sparselora-dist[report]'"
        )


def draw(picture: HeatMap, path: Path) -> None:
    """Write ``picture`` as a PNG."""
    from PIL import Image, ImageDraw, ImageFont

    from ..io.manifest import publish

    image = Image.new("RGB", picture.size, (255, 255, 255))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    ink: dict[str, Any] = {"fill": _INK, "font": font}
    top_value = max((value for row in picture.values.values() for value in row.values()), default=0.0)
    pen.text((16, 12), "Sensitivity to sparsity by layer", fill=_INK, font=ImageFont.load_default(18))
    for number, line in enumerate(picture.caption):
        pen.text((16, 38 + 17 * number), line, **ink)
    y = _TOP
    for group in picture.groups:
        _panel(pen, picture, group, y, top_value, ink)
        y += _ROW * len(picture.levels) + _GAP
    _strip(pen, picture, y, ink)
    _ticks(pen, picture, y + _STRIP, ink)
    pen.text((_LEFT + picture.cell * picture.layers // 2, y + _STRIP + 22), "decoder layer", anchor="mt", **ink)
    _legend(pen, picture, top_value, ink)
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    publish(temporary, path)


def colour(value: float, most: float) -> tuple[int, int, int]:
    """On a square-root scale, so that small increases can be told apart; gains are drawn as nothing."""
    place = (min(max(value, 0.0) / most, 1.0) if most > 0 else 0.0) ** 0.5 * (len(_STOPS) - 1)
    below = min(int(place), len(_STOPS) - 2)
    part = place - below
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_STOPS[below], _STOPS[below + 1]))
    return red, green, blue


def _panel(pen: Any, picture: HeatMap, group: str, top: int, most: float, ink: dict[str, Any]) -> None:
    cell = picture.cell
    pen.text((_LEFT, top - 4), f"{group}: {_NAMES[group]}", anchor="lb", **ink)
    for number, level in enumerate(reversed(picture.levels)):
        y = top + number * _ROW
        pen.text((_LEFT - 8, y + _ROW // 2), f"{level:.4g}", anchor="rm", **ink)
        for layer in range(picture.layers):
            x = _LEFT + layer * cell
            box = (x, y, x + cell - 1, y + _ROW - 1)
            pen.rectangle(box, fill=colour(picture.values[layer, group][level], most), outline=_GRID)
    for layer in range(picture.layers):
        chosen = picture.chosen.get((layer, group))
        if chosen is not None:
            x, y = _LEFT + layer * cell, top + (len(picture.levels) - 1 - picture.levels.index(chosen)) * _ROW
            pen.rectangle((x, y, x + cell - 1, y + _ROW - 1), outline=_MARK, width=2)
    _ticks(pen, picture, top + _ROW * len(picture.levels), ink)
    pen.text((16, top - 4), "sparsity", anchor="lb", **ink)


def _strip(pen: Any, picture: HeatMap, top: int, ink: dict[str, Any]) -> None:
    """The layers' importance, on a scale of its own."""
    most = max(picture.importance, default=0.0)
    pen.text((_LEFT, top - 4), f"layer importance (1 - mean CKA), darkest {most:.3g}", anchor="lb", **ink)
    for layer, value in enumerate(picture.importance):
        x = _LEFT + layer * picture.cell
        pen.rectangle((x, top, x + picture.cell - 1, top + _STRIP - 1), fill=colour(value, most), outline=_GRID)


def _ticks(pen: Any, picture: HeatMap, y: int, ink: dict[str, Any]) -> None:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * picture.cell >= 24 or n == 100)
    for layer in range(0, picture.layers, every):
        pen.text((_LEFT + layer * picture.cell + picture.cell // 2, y + 3), str(layer), anchor="mt", **ink)


def _legend(pen: Any, picture: HeatMap, most: float, ink: dict[str, Any]) -> None:
    bar, left, y = 160, 16, picture.size[1] - 50
    for x in range(bar):
        pen.line((left + x, y, left + x, y + 12), fill=colour((x / (bar - 1)) ** 2 * most, most))
    pen.rectangle((left, y, left + bar, y + 12), outline=_INK)
    for share, anchor in ((0.0, "lb"), (0.25, "mb"), (1.0, "rb")):
        pen.text((left + int(share**0.5 * bar), y - 3), f"{share * most:.2g}", anchor=anchor, **ink)
    pen.text((left + bar + 12, y + 6), f"{picture.unit} (square-root scale)", anchor="lm", **ink)
    y += 26
    pen.rectangle((left, y, left + 18, y + 12), outline=_MARK, width=2)
    pen.text((left + 26, y + 6), "chosen; a layer without a box stays dense", anchor="lm", **ink)
