"""The tables of pruned_quality.py, made from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pruned_arms import WAYS
from quality import spread

Row = dict[str, Any]

COLUMNS = (
    "seeds",
    "held-out loss",
    "perplexity",
    "gap recovered",
    "... to tuned dense",
    "against unmasked",
    "against masked",
    "zeros filled in",
    "loss, zeros put back",
)


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown lines, a table per task. What is recovered is a share of the way from the untuned pruned base to the dense
    one, and to the dense one with LoRA of the same seed."""
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        losses = {(row["base"], row["way"], row["seed"]): row["loss"] for row in mine}
        yield f"| {task}: base | tuned by | {' | '.join(COLUMNS)} |"
        yield "|---" * (len(COLUMNS) + 2) + "|"
        bases = list(dict.fromkeys(row["base"] for row in mine))
        pairs = {(row["base"], row["way"]) for row in mine}
        for base, way in sorted(pairs, key=lambda pair: (bases.index(pair[0]), list(WAYS).index(pair[1]))):
            yield _line(base, way, [row for row in mine if (row["base"], row["way"]) == (base, way)], losses)
        yield ""


def _line(base: str, way: str, rows: list[Row], losses: dict[tuple[str, str, int], float]) -> str:
    untuned, dense, gaps, closed = losses.get((base, "untuned", 0)), losses.get(("dense", "untuned", 0)), [], []
    for row in rows if way != "untuned" and base != "dense" and untuned is not None else []:
        # Tuning on a task that the base has not seen leads far below the dense base: no gap to speak of.
        if dense is not None and row["task"] == "general":
            gaps.append(100 * (untuned - row["loss"]) / (untuned - dense))
        if (tuned := losses.get(("dense", "plain", row["seed"]))) is not None:
            closed.append(100 * (untuned - row["loss"]) / (untuned - tuned))
    against = {
        reference: [
            100 * (row["loss"] / losses[key] - 1) for row in rows if (key := (base, reference, row["seed"])) in losses
        ]
        for reference in ("plain", "masked")
    }
    filled = [row["filled"] for row in rows if "filled" in row]
    back = [row["zeros back"] for row in rows if "zeros back" in row]
    cells = [
        base,
        {"untuned": "", "plain": "LoRA" if base == "dense" else "LoRA, unmasked"}.get(way, way),
        str(len(rows)),
        spread([row["loss"] for row in rows], "{:.4f}"),
        f"{math.exp(sum(row['loss'] for row in rows) / len(rows)):.3f}",
        _percent(gaps, "{:.0f}"),
        _percent(closed, "{:.0f}"),
        _percent(against["plain"], "{:+.2f}") if way == "masked" else "",
        _percent(against["masked"], "{:+.2f}") if way not in ("untuned", "plain", "masked") else "",
        f"{max(filled):,}" if filled else "",
        spread(back, "{:.4f}") if back else "",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(values: list[float], form: str) -> str:
    return spread(values, form) + " %" if values else ""
