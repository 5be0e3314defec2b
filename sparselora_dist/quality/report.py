"""One HTML page of a run: what it reached, how fast, how sparse, and how well the channels were chosen."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..config.run import RunConfig
from ..config.sparse import GROUPS
from ..io.manifest import write_text
from . import html
from .html import Line

_PACKAGES = ("sparselora-dist", "torch", "transformers", "peft", "deepspeed", "accelerate")
# Rows of metrics.jsonl in the page: 200 bytes each.
_KEPT_ROWS = 2000
_WHOSE = {"global": "all ranks", "node": "a node's ranks", "local": "each rank alone"}
_CHANNELS = {"ffn": "intermediate neurons", "qk": "rotary pairs of q and k", "vo": "value channels"}


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
    summary = _summary(run)
    rows = _metrics(run)
    body = [
        _headline(summary, run),
        _training(rows, run),
        *_sparsity(config, fidelity),
        *_fidelity(fidelity),
        html.section(
            "Settings", html.folded("Every key of run.json", html.table(("key", "value"), _settings(config), text=True))
        ),
        html.section(
            "Versions",
            html.paragraph("Of the environment that made this page."),
            html.table(("package", "version"), _versions(), text=True),
        ),
    ]
    model = Path(config.model.name_or_path).name
    title = f"Run {run.resolve().name}" if run else f"Estimator on {model}"
    lead = f"Model {config.model.name_or_path}, data {config.data.train}, engine {config.engine.name}."
    return html.page(title, lead, body, {"summary": summary, "metrics": _sample(rows), "fidelity": fidelity})


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


# --- sections ---------------------------------------------------------------------------------------------------------


def _headline(summary: Mapping[str, Any] | None, run: Path | None) -> str:
    if run is None:
        return html.missing(
            "This is no run: there are no results of training, only what the estimator does on this data."
        )
    if summary is None:
        return html.missing("summary.json is not there (the run has not finished): headline numbers are left out.")

    def change(before: str, after: str, show: Callable[[float], str]) -> str | None:
        values = [summary.get(name) for name in (before, after)]
        return None if values[1] is None else " → ".join(show(value) for value in values if value is not None)

    cards = [
        (change("eval_loss_start", "eval_loss", "{:.3f}".format), "evaluation loss before → after, nats per token"),
        (change("eval_exact_match_start", "eval_exact_match", "{:.1%}".format), "exact match before → after, of rows"),
        (
            change("train_loss_first", "train_loss_last", "{:.3f}".format),
            "training loss first → last step, nats per token",
        ),
        (_show(summary.get("tokens_per_second"), "{:,.0f}"), "tokens per second, all ranks"),
        (_show(summary.get("executed_flops_share"), "{:.1%}"), "FLOPs executed, of plain LoRA's"),
        (_show(summary.get("context_share"), "{:.1%}"), "tokens computed sparsely"),
        (_show(summary.get("steps"), "{:,d}"), f"steps on {summary.get('world_size', 1)} rank(s)"),
        (_show(summary.get("tokens"), "{:,d}"), "tokens trained on"),
    ]
    parts = [html.cards([(value, label) for value, label in cards if value is not None])]
    if summary.get("eval_loss") is None:
        parts.append(html.missing("The run had no evaluation data: loss and exact match on it are left out."))
    return "".join(parts)


def _show(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def _training(rows: Sequence[Mapping[str, float]], run: Path | None) -> str:
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    if not steps:
        what = "metrics.jsonl is not there or has no step in it" if run else "Nothing was trained"
        return html.section("Training", html.missing(f"{what}: the curves of loss, throughput and FLOPs are left out."))
    lines = [Line("training", _series(steps, "loss"))]
    note = ""
    if evaluations:
        lines.append(Line("evaluation", _series(evaluations, "eval_loss"), dots=True))
    else:
        note = html.missing("The run has no evaluation rows: the loss curve is of training alone.")
    loss = html.figure(
        "Loss",
        html.line_chart("Loss over steps", lines, "optimizer step", "nats per token"),
        "Cross entropy of the trained tokens in each global batch"
        + (", and of the evaluation data, computed densely." if evaluations else "."),
        "optimizer steps; nats per label token",
    )
    speed = html.figure(
        "Throughput",
        html.line_chart(
            "Throughput over steps",
            [Line("throughput", _series(steps, "tokens_per_second_per_gpu"))],
            "optimizer step",
            "tokens per second and rank",
            zero=True,
        ),
        "Real tokens of a step (no padding) by its wall time; the first step also warms up.",
        "optimizer steps; tokens per second per rank",
    )
    shares = html.figure(
        "Sparse work",
        html.line_chart(
            "Shares of context tokens and executed FLOPs over steps",
            [
                Line("context tokens", _percent(_series(steps, "sparsity/context_share"))),
                Line("executed FLOPs", _percent(_series(steps, "sparsity/executed_flops_share"))),
            ],
            "optimizer step",
            "per cent",
            zero=True,
        ),
        "Tokens computed sparsely, of all tokens; and floating point operations, of those of plain LoRA on the same "
        "tokens. Dense steps have no sparse tokens.",
        "optimizer steps; per cent",
    )
    return html.section("Training", note, html.figures(loss, speed, shares))


def _series(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _percent(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, 100 * y) for x, y in points]


def _sparsity(config: RunConfig, fidelity: Mapping[str, Any] | None) -> list[str]:
    if fidelity is None:
        return []
    sites = {(site["layer"], site["group"]): site["sparsity"] for site in fidelity["sites"]}
    values = [[sites.get((layer, group)) for group in GROUPS] for layer in range(fidelity["layers"])]
    layers = [str(layer) for layer in range(fidelity["layers"])]
    drawn = html.figure(
        "Sparsity",
        html.heat_map("Sparsity by layer and channel group", GROUPS, layers, values),
        "Share of a layer's channels that is left out for context tokens, by channel group: "
        + ", ".join(f"{group}: {what}" for group, what in _CHANNELS.items())
        + ".",
        "per cent of channels",
    )
    sparse = config.sparse_lora
    state = "" if sparse.enabled else " The run was dense (sparse_lora.enabled is false)."
    until = "the end" if sparse.end_step is None else f"{sparse.end_step:g}"
    text = (
        f"Estimator of rank {sparse.rank}, masks chosen from the tokens of {_WHOSE[sparse.mask_sync]}, kept for "
        f"{sparse.interval} step(s), sparse from {sparse.start_step:g} to {until} (fractions of the run, or steps).{state}"
    )
    return [html.section("Sparsity", html.paragraph(text), html.figures(drawn))]


def _fidelity(fidelity: Mapping[str, Any] | None) -> list[str]:
    if fidelity is None:
        return [html.section("Estimator", html.missing("The estimator was not measured: run sparselora-dist inspect."))]
    ranks, own = [str(rank) for rank in fidelity["ranks"]], fidelity["own_rank"]
    groups = fidelity["groups"]
    used = [layer for layer in range(fidelity["layers"]) if any(s["layer"] == layer for s in fidelity["sites"])]
    columns = [f"{group} r{rank}" for group in groups for rank in ranks]

    def cells(figure: str) -> list[list[float | None]]:
        return [[_mean(fidelity, layer, group, figure, rank) for group in groups for rank in ranks] for layer in used]

    layers = [str(layer) for layer in used]
    with_adapter = "with the run's adapter" if fidelity["adapter"] else "without an adapter"
    text = (
        f"Measured on {fidelity['rows']} rows of {Path(fidelity['data']).name} in {fidelity['batches']} batches of "
        f"{fidelity['rows_per_batch']}, {with_adapter}: {fidelity['context_tokens']:,} context tokens of "
        f"{fidelity['tokens']:,}. The exact choice is that of the frozen matrices' own activations."
    )
    maps = [
        html.figure(
            "Recall",
            html.heat_map("Recall by layer, group and rank", columns, layers, cells("recall")),
            "Channels kept by the estimator of rank r that the exact activations keep too. A random choice has "
            + ", ".join(f"{means['random_expected']:.0%} ({group})" for group, means in groups.items())
            + ".",
            "per cent of kept channels",
        ),
        html.figure(
            "Energy kept",
            html.heat_map("Energy kept by layer, group and rank", columns, layers, cells("energy")),
            "Exact scores (sums of squared activations) of the channels that the estimator of rank r keeps, of all "
            "channels. The exact choice keeps "
            + ", ".join(f"{means['energy']['exact']:.0%} ({group})" for group, means in groups.items())
            + ".",
            "per cent of squared activations",
        ),
    ]
    pairs = [(group, kind) for group in groups for kind in ("between_steps", "between_ranks")]
    stability = [[_mean(fidelity, layer, group, kind) for group, kind in pairs] for layer in used]
    if any(value is not None for line in stability for value in line):
        names = [f"{group} {'steps' if kind == 'between_steps' else 'ranks'}" for group, kind in pairs]
        maps.append(
            html.figure(
                "Mask stability",
                html.heat_map("Mask stability by layer and group", names, layers, stability),
                f"Kept channels in common at rank {own}: of consecutive batches (steps), and of the two halves of a batch, "
                "as two ranks that choose for themselves would see them (ranks).",
                "per cent of kept channels",
            )
        )
    else:
        maps.append(html.missing("There is one batch of one row: no masks to compare, stability is left out."))
    head = ("group", "mean, %", "random", *(f"rank {rank}" for rank in ranks), "exact")
    choices = ("random", *ranks, "exact")
    lines = [
        (group, figure, *(_number(means[figure].get(name)) for name in choices))
        for group, means in groups.items()
        for figure in ("recall", "energy")
    ]
    return [html.section("Estimator", html.paragraph(text), html.table(head, lines), html.figures(*maps))]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean(fidelity: Mapping[str, Any], layer: int, group: str, figure: str, choice: str | None = None) -> float | None:
    for site in fidelity["sites"]:
        if site["layer"] == layer and site["group"] == group:
            found = site[figure] if choice is None else site[figure].get(choice)
            return None if found is None else found["mean"]
    return None


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
