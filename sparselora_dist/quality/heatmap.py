"""The picture of a calibration: layers across, sparsity upwards, one panel a group, the choice outlined."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .budget import Site

_NAMES = {"ffn": "FFN neurons", "qk": "query/key pairs", "vo": "value/output channels"}
# From light to dark with the value, so that it also reads in grey; the red of the choice is in no colour of it.
_COLOURS, _GRID, _MARK = "Blues", "#e1e1e1", "#d62728"
# Inches. On a screen of 400 pixels the type of 11 points is 12 pixels high.
_WIDTH, _ROW, _STRIP, _HEADING, _LINE, _GAP, _KEY = 5.2, 0.24, 0.18, 0.46, 0.19, 0.56, 1.3
_TYPE, _SMALL, _DPI = 11, 9.5, 200
_LETTERS = 72  # Of a caption's line.


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


def check_drawable() -> None:
    """Refuse early what would fail at the end.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "the picture of a calibration needs matplotlib, which is not installed: "
            "pip install 'sparselora-dist[report]'"
        )


def draw(picture: HeatMap, path: Path) -> None:
    """Write ``picture`` as a PNG."""
    from ..io.manifest import publish

    temporary = path.with_name(f".{path.name}.tmp")
    # No version of the program in it: the same measurements give the same bytes.
    figure_of(picture).savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    publish(temporary, path)


def figure_of(picture: HeatMap) -> Any:
    """The matplotlib ``Figure``. Its axes: a panel a group, the strip of importance, the legend's bar."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    caption = [part for line in picture.caption for part in textwrap.wrap(line, _LETTERS)]
    panel = _ROW * len(picture.levels)
    y = _HEADING + _LINE * len(caption) + 0.4
    height = y + (panel + _GAP) * len(picture.groups) + _STRIP + _KEY
    figure = Figure((_WIDTH, height))
    left, width = 0.13, 0.83

    def axes(y: float, tall: float) -> Any:
        """Inches from the top of the picture, and of height."""
        return figure.add_axes((left, 1 - (y + tall) / height, width, tall / height))

    figure.text(0.03, 1 - 0.12 / height, "Sensitivity to sparsity by layer", va="top", fontsize=14)
    # Names are text: a "$" in one begins no formula.
    lines: dict[str, Any] = {"linespacing": 1.35, "parse_math": False}
    figure.text(0.03, 1 - _HEADING / height, "\n".join(caption), va="top", fontsize=_SMALL, **lines)
    most = max((value for row in picture.values.values() for value in row.values()), default=0.0)
    # A square root, so that small increases can be told apart; gains are drawn as nothing.
    scale = PowerNorm(0.5, 0, most if most > 0 else 1, clip=True)
    for group in picture.groups:
        mesh = _panel(axes(y, panel), picture, group, scale)
        y += panel + _GAP
    darkest = max(picture.importance, default=0.0)
    strip = axes(y, _STRIP)
    _cells(strip, [picture.importance], PowerNorm(0.5, 0, darkest if darkest > 0 else 1, clip=True))
    strip.set_yticks([])
    _title(strip, f"layer importance (1 - mean CKA), darkest {darkest:.3g}")
    strip.set_xlabel("decoder layer", fontsize=_SMALL)
    # The key: a bar of the panels' scale, and what a box means.
    bar = figure.add_axes((left, 0.6 / height, 0.3, 0.14 / height))
    figure.colorbar(
        mesh, cax=bar, orientation="horizontal", ticks=[0, most / 4, most] if most > 0 else [0], format="%.2g"
    )
    bar.tick_params(labelsize=_SMALL, length=2)
    right = left + 0.35
    figure.text(right, 0.67 / height, f"{picture.unit}\n(square-root scale)", fontsize=_SMALL, va="center")
    box = Rectangle((left, 0.13 / height), 0.05, 0.14 / height, fill=False, edgecolor=_MARK, linewidth=1.5)
    figure.add_artist(box)
    text = "chosen; a layer without a box stays dense"
    figure.text(left + 0.08, 0.2 / height, text, fontsize=_SMALL, va="center")
    return figure


def _panel(axes: Any, picture: HeatMap, group: str, scale: Any) -> Any:
    from matplotlib.patches import Rectangle

    levels = picture.levels
    mesh = _cells(axes, [[picture.values[n, group][level] for n in range(picture.layers)] for level in levels], scale)
    for (layer, of), level in picture.chosen.items():
        if of == group:
            at, line = (layer, levels.index(level)), 1.5 if picture.layers <= 40 else 1.0
            axes.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=_MARK, linewidth=line, clip_on=False))
    axes.set_yticks([number + 0.5 for number in range(len(levels))], [f"{level:.4g}" for level in levels])
    axes.set_ylabel("sparsity", fontsize=_SMALL)
    _title(axes, f"{group}: {_NAMES[group]}")
    return mesh


def _cells(axes: Any, values: Sequence[Sequence[float]], scale: Any) -> Any:
    """Rows upwards, a layer a column with at most 16 numbers below."""
    layers = len(values[0])
    mesh = axes.pcolormesh(values, cmap=_COLOURS, norm=scale, edgecolors=_GRID, linewidth=0.5 if layers <= 40 else 0.2)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * 16 >= layers or n == 100)
    shown = range(0, layers, every)
    axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.tick_params(length=0, labelsize=_SMALL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=_TYPE, pad=4)
