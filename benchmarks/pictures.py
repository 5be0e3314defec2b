"""The README's pictures, from what is committed: what is computed for which token, the measured speed-up, a 70B's memory.

    python benchmarks/pictures.py [--output docs/pictures]

Each is drawn twice, for a light and for a dark page. Numbers come from ``benchmarks/results/step_time.md`` and from the
planner; a file's description has a hash of them and of this script, so that a test can say that it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparselora_dist.config import RunConfig
from sparselora_dist.plan.hardware import Cluster, find_gpu
from sparselora_dist.plan.layouts import make_plan
from sparselora_dist.plan.shapes import find_shape
from sparselora_dist.plan.work import Batch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/step_time.md"
OUTPUT = ROOT / "docs/pictures"
RUN, MODEL, GPU, GPUS = "configs/llama3_70b_math_fsdp2.json", "llama-3-70b", "h100-80gb", (8, 64)
# Units of the view box: 12 of type are 9 pixels on a telephone.
_WIDTH, _TYPE = 520, 12

KINDS = {
    "weights and scales": ("weights", "scales"),
    "LoRA, optimizer, estimator": ("lora", "optimizer", "factors"),
    "activations and logits": ("activations", "logits"),
    "gathered at once": ("gather",),
}
"""What is stacked in the picture of memory, of the planner's kinds."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page."""

    suffix: str
    page: str
    ink: str
    faint: str
    """Of grids and of what is left out."""
    series: tuple[str, str, str, str]
    """Told apart by people who see no red or no green."""


THEMES = (
    Theme("", "#ffffff", "#1f2328", "#d8dee4", ("#0b5fa5", "#b4460e", "#7a8a99", "#2f9e8f")),
    Theme("-dark", "#0d1117", "#e6edf3", "#30363d", ("#58a6ff", "#f0a04b", "#8b98a5", "#4cc2b0")),
)


# --- numbers ----------------------------------------------------------------------------------------------------------


def speedups(text: str) -> dict[str, dict[float, tuple[float, float]]]:
    """dtype -> share of context tokens -> (measured speed-up, the one by FLOPs), against plain LoRA."""
    row = re.compile(r"\| `--dtype (\w+) --context ([\d.]+)` \| ([\d.]+) \| ([\d.]+) \|")
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for dtype, share, measured, ideal in row.findall(text):
        found.setdefault(dtype, {})[float(share)] = (float(measured), float(ideal))
    if not found:
        raise ValueError("step_time.md has no row like '| `--dtype float32 --context 0.5` | 1.5 | 1.6 |'")
    return {dtype: dict(sorted(points.items())) for dtype, points in found.items()}


def memory() -> dict[str, Any]:
    """Bytes a GPU of every layout by kind, on one node and on several, and how many may be used."""
    config, shape, gpu = RunConfig.from_file(ROOT / RUN), find_shape(MODEL), find_gpu(GPU)
    tokens = config.train.per_device_train_batch_size * config.data.max_length
    batch = Batch(tokens=tokens, context=0.75, length=config.data.max_length)
    layouts = {}
    for gpus in GPUS:
        plan = make_plan(shape, config, Cluster(gpu=gpu, gpus=gpus, per_node=8), batch)
        layouts[gpus] = {
            layout.name: {name: sum(layout.bytes[kind] for kind in kinds) for name, kinds in KINDS.items()}
            for layout in plan.layouts
        }
    return {"tokens": tokens, "usable": gpu.usable, "layouts": layouts}


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_idea(theme: Theme, data: dict[str, Any]) -> Figure:
    """Tokens across, channels downwards: kept channels for the context, all of them for the answer."""
    context, answer, channels, kept = 13, 6, 8, (1, 5)
    blue, orange = theme.series[:2]
    figure = _figure(300)
    axes = figure.subplots()
    axes.set(xlim=(-0.1, context + answer + 0.6), ylim=(3 * (channels + 1.2), -3.4))
    axes.axis("off")
    cells: dict[str, list[tuple[float, float]]] = {theme.faint: [], blue: [], orange: []}
    for number, name in enumerate(("gate", "up", "down")):
        top = number * (channels + 1.2)
        for token in range(context):
            for channel in range(channels):
                cells[blue if channel in kept else theme.faint].append((token + 0.43, top + channel + 0.4))
        for token in range(context, context + answer):
            cells[orange] += [(token + 0.93, top + channel + 0.4) for channel in range(channels)]
        axes.text(-0.4, top + channels / 2, f"{name}\nchannels", ha="right", va="center")
    box = [(-1, -0.36), (1, -0.36), (1, 0.36), (-1, 0.36)]
    for colour, places in cells.items():
        axes.plot(*zip(*places), linestyle="", marker=box, markersize=17.5, color=colour, markeredgewidth=0)
    for left, width, text, colour in (
        (0, context, "prompt tokens: no loss", blue),
        (context + 0.5, answer, "answer tokens", orange),
    ):
        axes.plot([left, left + width - 0.14], [-0.7, -0.7], color=colour, linewidth=2)
        axes.text(left + width / 2, -1.3, text, ha="center", va="bottom", color=colour, fontweight="bold")
    _legend(
        figure,
        [("chosen for this batch", blue), ("all channels", orange), ("not computed", theme.faint)],
    )
    return figure


def draw_speed(theme: Theme, data: dict[str, Any]) -> Figure:
    """Measured points under the line of the FLOPs."""
    figure = _figure(290)
    axes = figure.subplots()
    every = {share: ideal for points in data.values() for share, (_, ideal) in points.items()}
    shares = sorted(every)
    axes.plot(
        [100 * share for share in shares],
        [every[share] for share in shares],
        color=theme.series[2], linestyle="--", label="limit by FLOPs",
    )  # fmt: skip
    for (dtype, points), colour, marker in zip(data.items(), theme.series, "os^v"):
        places = [100 * share for share in points], [measured for measured, _ in points.values()]
        axes.plot(*places, color=colour, marker=marker, markersize=8, linestyle="", label=f"measured, {dtype}")
        for place in zip(*places):
            style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": colour}
            axes.annotate(f"{place[1]:.2f}x", place, (9, 0), **style)
    axes.set(xlim=(18, 82), ylim=(1, 0.05 + max(every.values())), xticks=[100 * share for share in shares])
    axes.set_xlabel("context tokens, % of all")
    axes.set_title("speed-up of a training step against dense LoRA, times", loc="left", fontsize=_TYPE)
    _plain(axes, theme, "y")
    axes.legend(loc="upper left", framealpha=1, edgecolor="none")
    return figure


def draw_memory(theme: Theme, data: dict[str, Any]) -> Figure:
    """A bar a layout, its kinds one after the other; the line is what may be used."""
    layouts, usable = data["layouts"], data["usable"] / 1e9
    figure = _figure(520)
    panels = figure.subplots(len(layouts), sharex=True, height_ratios=[len(rows) + 1 for rows in layouts.values()])
    for axes, (gpus, rows) in zip(panels, layouts.items()):
        names = list(rows)
        left = [0.0] * len(names)
        for kind, colour in zip(KINDS, theme.series):
            sizes = [rows[name][kind] / 1e9 for name in names]
            axes.barh(names, sizes, left=left, color=colour, height=0.72)
            left = [a + b for a, b in zip(left, sizes)]
        for number, total in enumerate(left):
            axes.text(total + 1.5, number, f"{total:.1f}" if total < 100 else f"{total:.0f}", va="center")
        axes.axvline(usable, color=theme.ink, linestyle=":", linewidth=1.5)
        axes.invert_yaxis()
        axes.set_title(f"70B on {gpus} GPUs", loc="left", fontsize=_TYPE, fontweight="bold")
        axes.set_xlim(0, 1.12 * max(left))
        _plain(axes, theme, "x")
    panels[0].text(usable + 1.5, -0.75, f"usable of 80: {usable:.1f}", va="bottom")
    panels[-1].set_xlabel("GB a GPU")
    _legend(figure, list(zip(KINDS, theme.series)))
    return figure


def _figure(height: int) -> Figure:
    return Figure((_WIDTH / 72, height / 72), layout="constrained")


def _legend(figure: Figure, entries: list[tuple[str, str]]) -> None:
    handles = [Patch(facecolor=colour, label=name) for name, colour in entries]
    columns = len(entries) if len(entries) < 4 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=1)


def _plain(axes: Any, theme: Theme, grid: str) -> None:
    axes.grid(axis=grid, color=theme.faint)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


PICTURES: dict[str, tuple[Callable[[Theme, dict[str, Any]], Figure], Callable[[], dict[str, Any]]]] = {
    "idea": (draw_idea, dict),
    "speed": (draw_speed, lambda: speedups(RESULTS.read_text(encoding="utf-8"))),
    "memory": (draw_memory, memory),
}
"""How a picture is drawn, and its numbers."""


def style(theme: Theme, salt: str) -> dict[str, Any]:
    """matplotlib's settings: text as shapes, so that a picture looks the same with any fonts; the same bytes every time."""
    return {
        "svg.fonttype": "path", "svg.hashsalt": salt, "font.size": _TYPE, "font.family": "DejaVu Sans",
        "figure.facecolor": theme.page, "savefig.facecolor": theme.page, "axes.facecolor": theme.page,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "xtick.color": theme.ink, "ytick.color": theme.ink,
    }  # fmt: skip


def mark(data: dict[str, Any]) -> str:
    """Of the numbers and of this script: what a picture was made from."""
    content = json.dumps(data, sort_keys=True).encode() + Path(__file__).read_bytes()
    return f"made from sha256:{hashlib.sha256(content).hexdigest()}"


def make(output: Path) -> list[Path]:
    """Draw them all into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (draw, numbers) in PICTURES.items():
        data = numbers()
        about: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type")) | {"Description": mark(data)}
        for theme in THEMES:
            made.append(output / f"{name}{theme.suffix}.svg")
            with rc_context(style(theme, name)):
                draw(theme, data).savefig(made[-1], format="svg", metadata=about)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default docs/pictures")
    for path in make(parser.parse_args().output):
        print(f"{path}: {path.stat().st_size:,} bytes")
