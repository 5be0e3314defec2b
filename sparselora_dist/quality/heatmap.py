"""The picture of a calibration: layers across, sparsity upwards, one panel a group, the choice outlined."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .budget import Site

_NAMES = {
    "ffn": "FFN neurons",
    "qk": "query/key pairs",
    "vo": "value/output channels",
    "experts": "neurons of each expert",
}
# From light to dark with the value, so that it also reads in grey; the red of the choice is in no colour of it.
_COLOURS, _GRID, _MARK = "Blues", "#e1e1e1", "#d62728"
# Inches. On a screen of 400 pixels the type of 11 points is 12 pixels high.
_WIDTH, _ROW, _PANEL, _LINE, _ENDS = 5.2, 0.24, 0.5, 0.19, 1.45
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
    """The matplotlib ``Figure``. Its axes: a panel a group, the strip of importance, the bar of the panels' scale."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    def scale(most: float) -> Any:
        """A square root, so that small increases can be told apart; gains are drawn as nothing."""
        return PowerNorm(0.5, 0, most if most > 0 else 1, clip=True)

    caption = [part for line in picture.caption for part in textwrap.wrap(line, _LETTERS)]
    rows = len(picture.levels)
    height = _ROW * (rows * len(picture.groups) + 1) + _PANEL * (len(picture.groups) + 1) + _LINE * len(caption) + _ENDS
    figure = Figure((_WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.08))
    # Names are text: a "$" in one begins no formula.
    style: dict[str, Any] = {"ha": "left", "va": "top", "linespacing": 1.35, "parse_math": False}
    figure.suptitle("\n".join(("", "", *caption)), x=0.02, fontsize=_SMALL, **style)
    figure.text(0.02, 1 - 0.1 / height, "Sensitivity to sparsity by layer", fontsize=13, **style)
    *panels, strip = figure.subplots(len(picture.groups) + 1, height_ratios=[rows] * len(picture.groups) + [1])
    most = max((value for row in picture.values.values() for value in row.values()), default=0.0)
    for axes, group in zip(panels, picture.groups):
        mesh = _panel(axes, picture, group, scale(most))
    darkest = max(picture.importance, default=0.0)
    _cells(strip, [picture.importance], scale(darkest), f"layer importance (1 - mean CKA), darkest {darkest:.3g}")
    strip.set_yticks([])
    strip.set_xlabel("decoder layer", fontsize=_SMALL)
    ticks = [0, most / 4, most] if most > 0 else [0]
    bar = figure.colorbar(mesh, ax=[*panels, strip], location="bottom", aspect=40, ticks=ticks, format="%.2g")
    bar.ax.tick_params(labelsize=_SMALL)
    bar.set_label(f"{picture.unit} (square-root scale)", fontsize=_SMALL)
    box = Patch(fill=False, edgecolor=_MARK, linewidth=1.5, label="chosen; a layer without a box stays dense")
    figure.legend(handles=[box], loc="outside lower left", frameon=False, fontsize=_SMALL)
    return figure


def _panel(axes: Any, picture: HeatMap, group: str, scale: Any) -> Any:
    from matplotlib.patches import Rectangle

    levels = picture.levels
    mesh = _cells(
        axes,
        [[_value(picture, (n, group), level) for n in range(picture.layers)] for level in levels],
        scale,
        f"{group}: {_NAMES[group]}",
    )
    for (layer, of), level in picture.chosen.items():
        if of == group:
            at, line = (layer, levels.index(level)), 1.5 if picture.layers <= 40 else 1.0
            axes.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=_MARK, linewidth=line, clip_on=False))
    axes.set_yticks([number + 0.5 for number in range(len(levels))], [f"{level:.4g}" for level in levels])
    axes.set_ylabel("sparsity", fontsize=_SMALL)
    return mesh


def _value(picture: HeatMap, site: Site, level: float) -> float:
    """Nothing is drawn where the layer has no such group."""
    return picture.values[site][level] if site in picture.values else float("nan")


def _cells(axes: Any, values: Sequence[Sequence[float]], scale: Any, title: str) -> Any:
    """Rows upwards, a layer a column with at most 16 numbers below."""
    layers = len(values[0])
    mesh = axes.pcolormesh(values, cmap=_COLOURS, norm=scale, edgecolors=_GRID, linewidth=0.5 if layers <= 40 else 0.2)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * 16 >= layers or n == 100)
    shown = range(0, layers, every)
    axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.set_title(title, loc="left", fontsize=_TYPE, pad=4)
    axes.tick_params(length=0, labelsize=_SMALL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh
