"""Drawing: one self-contained HTML page of figures and tables. No script, no network, nothing but strings.

Figures are SVGs with a small view box, so that their text stays legible on a narrow screen. Every figure has a caption that
ends with its units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# Told apart by people who see no red or no green, and 4.5 : 1 or more on white.
COLOURS = ("#0b5fa5", "#b4460e", "#2f7a3d", "#6b3fa0")
_INK, _FAINT, _GRID = "#1d2530", "#57616e", "#dde3ea"
_DARKEST = (11, 74, 130)
# Points drawn per line; more are averaged in between.
_POINTS = 240
# Of a view box: 12 units of text are 10 to 11 pixels on a screen of 400, and 14 on a wide one.
_WIDTH = 400
# Of a heat map, so that its heading fits; more columns than the width holds scroll on a narrow screen.
_COLUMN = 58

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f5f7fa;color:#1d2530;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 24px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 12px}
p{margin:0 0 12px;max-width:75ch;overflow-wrap:anywhere}
.lead,.missing,figcaption{color:#57616e}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:12px;margin:20px 0 8px}
.card{background:#fff;border:1px solid #dde3ea;border-radius:8px;padding:12px 16px}
.card b{display:block;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.card span{font-size:.875rem;color:#57616e}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;align-items:start}
figure{margin:0;background:#fff;border:1px solid #dde3ea;border-radius:8px;padding:14px 16px}
figure svg{display:block;width:100%;max-width:480px;height:auto;margin:0 auto}
figure h3{margin:0 0 6px;font-size:1rem}
figcaption{font-size:.875rem;margin-top:8px}
.unit{display:block}
.wide{overflow-x:auto;background:#fff;border:1px solid #dde3ea;border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 12px;border-bottom:1px solid #e8ecf1}
th{font-weight:600}
td:first-child,th:first-child{text-align:left}
table.text td,table.text th{text-align:left;overflow-wrap:anywhere}
details{margin:8px 0 0}
summary{cursor:pointer;margin-bottom:8px}
.wide{margin-bottom:16px}
.scroll{overflow-x:auto}
tr:last-child td{border-bottom:0}
.missing{border-left:3px solid #9aa7b5;padding-left:12px}
@media (max-width:760px){
main{padding:16px 12px 48px}
.figures{grid-template-columns:minmax(0,1fr)}
.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}
.card{padding:10px 12px}
.card b{font-size:1.15rem}
figure{padding:10px}
h1{font-size:1.3rem}
th,td{padding:5px 8px}
}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """A named series."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    """Draw the points too: few of them."""


def page(title: str, lead: str, body: Sequence[str], data: Mapping[str, Any]) -> str:
    """The whole document; ``data`` is kept in it as JSON, for programs."""
    # "</script>" inside a string would end the element.
    kept = json.dumps(finite(data), indent=1).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<link rel="icon" href="data:,">',  # Or the browser asks for one.
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
            *body,
            f'<script type="application/json" id="data">{kept}</script>',
            "</main></body></html>",
            "",
        ]
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def figures(*parts: str) -> str:
    """Two side by side where there is room."""
    return f'<div class="figures">{"".join(parts)}</div>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def folded(title: str, inner: str) -> str:
    """Long things that few want to read."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def missing(text: str) -> str:
    """A sentence in the place of what is not there."""
    return f'<p class="missing">{escape(text)}</p>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Headline numbers: (value, what it is)."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in values
    )
    return f'<div class="cards">{inner}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """``text``: cells of words, to the left."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, svg: str, caption: str, units: str) -> str:
    return (
        f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)} "
        f'<span class="unit">Units: {escape(units)}.</span></figcaption></figure>'
    )


# --- drawings ---------------------------------------------------------------------------------------------------------


def line_chart(label: str, lines: Sequence[Line], x_unit: str, y_unit: str, *, zero: bool = False) -> str:
    """Lines over a common axis; ``zero`` begins the vertical axis at 0. Points that are not finite are left out."""
    width, height, left, right, top, bottom = _WIDTH, 240, 50, 14, 24 + 16 * (len(lines) > 1), 40
    drawn = [Line(line.name, thin(line.points), line.dots) for line in lines]
    xs = [x for line in drawn for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in drawn for _, y in line.points] or [0.0, 1.0]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(0.0 if zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom),
        )

    parts = []
    for y in y_ticks:
        _, v = at(x_low, y)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{v:.1f}" y2="{v:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(left - 6, v + 4, number(y), "end"))
    for x in x_ticks:
        if x_low <= x <= x_high:
            u, _ = at(x, y_low)
            parts.append(_text(u, height - bottom + 16, number(x), "middle"))
    for colour, line in zip(_colours(len(drawn)), drawn):
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in (at(x, y) for x, y in line.points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if line.dots or len(line.points) == 1:
            spots = (at(x, y) for x, y in line.points)
            parts += [f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3.5" fill="{colour}"/>' for u, v in spots]
    parts.append(_text(left, 14, y_unit, "start", _FAINT))
    parts.append(_text((left + width - right) / 2, height - 6, x_unit, "middle", _FAINT))
    offset = float(left)
    for colour, line in zip(_colours(len(drawn)), drawn if len(drawn) > 1 else []):
        parts.append(f'<rect x="{offset:.0f}" y="22" width="12" height="4" fill="{colour}"/>')
        parts.append(_text(offset + 17, 28, line.name, "start"))
        offset += 32 + 6.4 * len(line.name)
    return _svg(width, height, label, parts)


def heat_map(label: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """Shares in [0, 1] as shaded cells with their per cent in them; ``None`` is an empty cell. One row per layer."""
    tall = 18 if len(rows) <= 40 else 13
    size = 12 if tall == 18 else 10
    left, top = 44, 24
    width = max(_WIDTH, left + 4 + _COLUMN * len(columns))
    cell = (width - left - 4) / max(len(columns), 1)
    parts = [_text(4, 15, "layer", "start", _FAINT)]
    parts += [_text(left + cell * (i + 0.5), 15, name, "middle") for i, name in enumerate(columns)]
    for j, row in enumerate(rows):
        y = top + j * tall
        parts.append(_text(left - 8, y + tall * 0.74, row, "end", size=size))
        for i, value in enumerate(values[j]):
            x = left + i * cell
            fill, ink = ("#f0f2f5", _FAINT) if value is None else _shade(value)
            shown = "dense" if value is None else f"{100 * value:.0f}"
            said = "dense" if value is None else f"{100 * value:.1f} %"
            parts.append(
                f"<g><title>layer {escape(row)}, {escape(columns[i])}: {said}</title>"
                f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{cell - 2:.1f}" height="{tall - 2}" rx="2" fill="{fill}"/>'
                + _text(x + cell / 2, y + tall * 0.74, shown, "middle", ink, size)
                + "</g>"
            )
    return _svg(width, top + tall * len(rows) + 6, label, parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    least = f' style="min-width:{width:.0f}px"' if width > _WIDTH else ""
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'font-family="inherit"{least}>{"".join(parts)}</svg></div>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _shade(value: float) -> tuple[str, str]:
    """White (0) to dark blue (1), and the ink that can be read on it."""
    share = min(max(value, 0.0), 1.0)
    red, green, blue = (round(255 + (end - 255) * share) for end in _DARKEST)
    # Relative luminance; black and white have the same contrast, 4.6 : 1, at 0.18.
    light = sum(
        weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for weight, part in zip((0.2126, 0.7152, 0.0722), (red / 255, green / 255, blue / 255))
    )
    return f"rgb({red},{green},{blue})", "#000000" if light > 0.18 else "#ffffff"


# --- numbers ----------------------------------------------------------------------------------------------------------


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours; what is not finite is left out."""
    good = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(good) / _POINTS) if good else 1
    chunks = [good[start : start + size] for start in range(0, len(good), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, the first at or below ``low`` and the last at or above ``high``."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 0.25, 12, 3.5k, 1.2M."""
    for limit, size, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def finite(data: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
