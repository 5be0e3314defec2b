"""One HTML page of a run: what it reached, how fast, how sparse, and how well the channels were chosen.

Values are gathered here; what the page says of them, and how it looks, is ``templates/report.html.jinja``.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..config.run import RunConfig
from ..config.sparse import GROUPS
from ..io.manifest import write_text
from .curves import HEIGHT, WIDTH, Line, line_chart

_PACKAGES = ("sparselora-dist", "torch", "transformers", "peft", "deepspeed", "accelerate")
# Rows of metrics.jsonl in the page: 200 bytes each.
_KEPT_ROWS = 2000

Row = Mapping[str, float]


def write_report(path: Path, config: RunConfig, run: Path | None, fidelity: dict[str, Any] | None) -> None:
    """Write the page to ``path``; see :func:`render`."""
    write_text(path, render(config, run, fidelity))


def render(config: RunConfig, run: Path | None, fidelity: dict[str, Any] | None) -> str:
    """The page. What is not there is left out, with a sentence that says so.

    Args:
        config: the run, as it was used.
        run: its output_dir with ``metrics.jsonl`` and ``summary.json``; ``None``: nothing was trained.
        fidelity: see :func:`sparselora_dist.quality.subject.measure`; ``None``: not measured.
    """
    summary, rows = _summary(run), _metrics(run)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    pages = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("report.html.jinja").render(
        config=config,
        run=run.resolve().name if run else None,
        model=Path(config.model.name_or_path).name,
        summary=summary,
        steps=len(steps),
        evaluations=len(evaluations),
        curves=_curves(steps, evaluations) if steps and find_spec("matplotlib") else None,
        view=f"0 0 {WIDTH} {HEIGHT}",
        fidelity=fidelity,
        rows_from=Path(fidelity["data"]).name if fidelity else None,
        maps=_maps(fidelity) if fidelity else None,
        settings=_settings(config),
        versions=_versions(),
        data=_finite({"summary": summary, "metrics": _sample(rows), "fidelity": fidelity}),
    )


# --- what the run left ------------------------------------------------------------------------------------------------


def _summary(run: Path | None) -> dict[str, Any] | None:
    path = run / "summary.json" if run else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None


def _metrics(run: Path | None) -> list[dict[str, float]]:
    """Rows of ``metrics.jsonl``; one that a crash cut off is left out."""
    path = run / "metrics.jsonl" if run else None
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            found.append(row)
    return found


def _sample(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """What the page keeps as data: every evaluation, and of a long run every n-th step."""
    every = -(-len(rows) // _KEPT_ROWS) or 1
    return [row for i, row in enumerate(rows) if i % every == 0 or "eval_loss" in row]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _curves(steps: Sequence[Row], evaluations: Sequence[Row]) -> dict[str, str]:
    """SVG by name."""
    losses = [Line("training", _series(steps, "loss"))]
    if evaluations:
        losses.append(Line("evaluation", _series(evaluations, "eval_loss"), dots=True))
    speed = Line("throughput", _series(steps, "tokens_per_second_per_gpu"))
    shares = [
        Line(name, [(x, 100 * y) for x, y in _series(steps, f"sparsity/{key}_share")])
        for name, key in (("context tokens", "context"), ("executed FLOPs", "executed_flops"))
    ]
    step = "optimizer step"
    return {
        "loss": line_chart(losses, step, "nats per token"),
        "throughput": line_chart([speed], step, "tokens per second and rank", zero=True),
        "work": line_chart(shares, step, "per cent", zero=True),
    }


def _series(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _maps(fidelity: Mapping[str, Any]) -> dict[str, Any]:
    """Heat maps by name: (columns, rows of (layer, a share in [0, 1] or None for each column))."""
    sites = {(site["layer"], site["group"]): site for site in fidelity["sites"]}
    groups, ranks = fidelity["groups"], [str(rank) for rank in fidelity["ranks"]]
    used = sorted({layer for layer, _ in sites})

    def mean(layer: int, group: str, figure: str, choice: str | None = None) -> float | None:
        found = sites[layer, group][figure] if (layer, group) in sites else None
        found = found.get(choice) if found and choice else found
        return found["mean"] if found else None

    def by_rank(figure: str) -> tuple[list[str], list[Any]]:
        pairs = [(group, rank) for group in groups for rank in ranks]
        rows = [(layer, [mean(layer, group, figure, rank) for group, rank in pairs]) for layer in used]
        return [f"{group} r{rank}" for group, rank in pairs], rows

    pairs = [(group, other) for group in groups for other in ("steps", "ranks")]
    stable = [(layer, [mean(layer, group, f"between_{other}") for group, other in pairs]) for layer in used]
    # Those of a mixture only where there is one.
    shown = [group for group in GROUPS if group != "experts" or group in groups]
    sparsity = [
        (layer, [sites[layer, group]["sparsity"] if (layer, group) in sites else None for group in shown])
        for layer in range(fidelity["layers"])
    ]
    return {
        "sparsity": (shown, sparsity),
        "recall": by_rank("recall"),
        "energy": by_rank("energy"),
        "stability": ([f"{group} {other}" for group, other in pairs], stable),
        "compared": any(value is not None for _, values in stable for value in values),
    }


def _settings(config: RunConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def walk(at: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{at}.{key}" if at else key, inner)
        elif value is not None and value != {}:
            found.append((at, value if isinstance(value, str) else json.dumps(value)))

    walk("", config.to_dict())
    return found


def _versions() -> list[tuple[str, str]]:
    found = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _finite(data: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
