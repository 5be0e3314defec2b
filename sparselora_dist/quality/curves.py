"""Curves of a report, drawn by matplotlib as SVG that stands inside a page: text stays text, nothing is fetched."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

Points = Sequence[tuple[float, float]]

# Told apart by people who see no red or no green, and 4.5 : 1 or more on white.
COLOURS = ("#0b5fa5", "#b4460e", "#2f7a3d", "#6b3fa0")
# Units of the view box and points of type: 12 are 10 to 11 pixels on a screen of 400, and 14 on a wide one.
WIDTH, HEIGHT, _TYPE = 400, 240, 12
_FAINT, _GRID = "#57616e", "#dde3ea"
# Points drawn per line; more are averaged in between.
_POINTS = 240


@dataclass(frozen=True, slots=True)
class Line:
    """A named series of (x, y)."""

    name: str
    points: Points
    dots: bool = False
    """Draw the points too: few of them."""


def line_chart(lines: Sequence[Line], x_unit: str, y_unit: str, *, zero: bool = False) -> str:
    """What belongs into an ``<svg viewBox="0 0 WIDTH HEIGHT">``: lines over a common axis of whole numbers.

    ``zero`` begins the vertical axis at 0. Points that are not finite are left out. The same lines give the same bytes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    salt = " ".join([*(line.name for line in lines), y_unit])  # Names of markers: other ones in every figure of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": _TYPE}):
        figure = Figure((WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            points = thin(line.points)
            dots = "o" if line.dots or len(points) == 1 else ""
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": dots, "markersize": 6}
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=line.name, linewidth=2, clip_on=False, **style
            )
        if zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axes.set_xlabel(x_unit, color=_FAINT)
        # Above the axis and not along it: nobody has to turn the telephone.
        axes.set_title(y_unit, color=_FAINT, loc="left", fontsize=_TYPE)
        axes.grid(axis="y", color=_GRID)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=len(lines), frameon=False, handlelength=1, borderaxespad=0)
        text = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    inner = text.getvalue().partition("<svg ")[2].partition(">")[2].rpartition("</svg>")[0]
    # Names of groups ("text_1") would occur once a figure in the page; nothing refers to them.
    return re.sub(r' id="[\w.]+_\d+"', "", inner)


def thin(points: Points) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours; what is not finite is left out."""
    good = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(good) / _POINTS) if good else 1
    chunks = [good[start : start + size] for start in range(0, len(good), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
