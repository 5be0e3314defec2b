"""What ``make test-oldest`` installs are the lower bounds of pyproject.toml, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS_CUDA = {"liger-kernel"}  # Not installed where there is no GPU.
TOOLS = "dev"


def test_constraints_are_the_floors() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [entry for name, group in project["optional-dependencies"].items() if name != TOOLS for entry in group]
    floors = {}
    for entry in (*project["dependencies"], *optional):
        if not entry.startswith("sparselora-dist["):
            match = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<[\d.]+)?", entry)
            assert match, f"{entry} promises no oldest version"
            floors[match[1].lower()] = match[2]
    first, _ = (ROOT / "constraints-oldest.txt").read_text().split("\n\n", 1)
    pinned = dict(line.split("==") for line in first.splitlines() if not line.startswith("#"))
    assert pinned.keys() == floors.keys() - NEEDS_CUDA
    for name, version in pinned.items():
        # 4.1 promises 4.1.0.
        assert re.sub(r"(\.0)+$", "", version) == re.sub(r"(\.0)+$", "", floors[name]), name
