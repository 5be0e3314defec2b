"""What benchmarks/gpu.py leaves: a file of rows, each written as it comes, and Markdown tables; and its time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

MARGIN_SECONDS = 10


class Budget:
    """Seconds that are left, and whether the next piece of work fits, from what the last ones took."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self._rate = 0.0

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, work: float) -> bool:
        """Whether ``work`` (in any unit, always the same) is likely to end in time."""
        return self.left > 1.3 * self._rate * work + MARGIN_SECONDS

    def took(self, work: float, seconds: float) -> None:
        self._rate = max(0.5 * self._rate, seconds / work)

    def share(self, part: float) -> Budget:
        """A budget of ``part`` of what is left."""
        return Budget(part * self.left)


class Report:
    """Rows by table. Each is printed, appended to ``rows`` and on the disk before the next is measured; a run that is cut
    off leaves all that it had. ``markdown`` is written after every part."""

    def __init__(self, about: dict[str, Any], rows: str | None = None, markdown: str | None = None) -> None:
        self.about, self.tables = about, dict[str, list[dict[str, Any]]]()
        self.wrong: list[str] = []
        """What failed its tolerance."""
        self._rows, self._markdown = rows, markdown
        if rows:
            Path(rows).parent.mkdir(parents=True, exist_ok=True)
        self._append({"table": "about", **about})

    def add(self, name: str, row: dict[str, Any]) -> None:
        """One row of the table ``name``."""
        self.tables.setdefault(name, []).append(row)
        self._append({"table": name, **row})

    def judge(self, name: str, row: dict[str, Any], what: str, right: bool) -> None:
        """A row with its verdict: a wrong result is a row like the others, and a name in the closing line."""
        self.add(name, {**row, "right": right})
        if not right:
            self.wrong.append(what)

    def leave_out(self, part: str, what: str, why: str) -> None:
        self.add("left out", {"part": part, "what": what, "why": why})

    def write(self) -> None:
        if self._markdown:
            text = "\n".join(table(name, rows) for name, rows in self.tables.items())
            Path(self._markdown).write_text(f"{json.dumps(self.about)}\n{text}", encoding="utf-8")

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self._rows:
            with open(self._rows, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_rows(path: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Tables of a file of rows; a last line that was cut off is left out."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        tables.setdefault(row.pop("table"), []).append(row)
    return tables


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown; the columns are those of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"\n## {name}\n"]
    if columns:
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else str(value).replace("|", "\\|").replace("\n", " ")
    )
