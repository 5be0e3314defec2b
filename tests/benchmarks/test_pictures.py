"""The README's pictures: their numbers are those of the results and of the planner, and the committed files are current."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparselora_dist.cli import main
from support.harness import ROOT

pytest.importorskip("matplotlib")
NAMES = ("idea", "memory", "speed")
FILES = sorted(f"{name}{suffix}.svg" for name in NAMES for suffix in ("", "-dark"))


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """The script."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "benchmarks/pictures.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["pictures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(pictures: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "new"
    made = pictures.make(folder)
    assert sorted(path.name for path in made) == sorted(path.name for path in folder.iterdir()) == FILES
    return folder


def made_from(path: Path) -> str:
    found = re.search(r"made from sha256:[0-9a-f]{64}", path.read_text(encoding="utf-8"))
    assert found, f"{path} does not say what it was made from"
    return found[0]


@pytest.mark.parametrize("name", FILES)
def test_the_committed_ones_are_current(name: str, pictures: ModuleType, drawn: Path) -> None:
    committed = ROOT / "docs/pictures" / name
    assert made_from(committed) == made_from(drawn / name), "run `make pictures`, and commit docs/pictures"
    ElementTree.parse(committed)
    text = committed.read_text(encoding="utf-8")
    assert len(text) < 100_000 and not re.search(r"<script|<image|href=\"(?!#)", text)


def test_they_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"docs/pictures/([\w-]+\.svg)", text)) == FILES
    assert len(re.findall(r'<img [^>]*alt="[^"]{40,}"', text)) == len(NAMES)


def test_speed_is_what_was_measured(pictures: ModuleType) -> None:
    """Read here in another way: cell by cell."""
    lines = (ROOT / "benchmarks/results/step_time.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `--dtype")]
    plain = {tuple(row[0].split()[1::2]): tuple(map(float, row[1:3])) for row in cells if "--credit" not in row[0]}
    found = pictures.speedups(pictures.RESULTS.read_text(encoding="utf-8"))
    assert {(dtype, f"{share:g}"): pair for dtype, points in found.items() for share, pair in points.items()} == plain
    axes = pictures.draw_speed(pictures.THEMES[0], found).axes[0]
    for line, dtype in zip(axes.lines[1:], found):
        assert line.get_label() == f"measured, {dtype}"
        assert [(x / 100, y) for x, y in zip(*line.get_data())] == [(x, pair[0]) for x, pair in found[dtype].items()]
    ideal = dict(zip(*axes.lines[0].get_data()))
    assert ideal == {100 * share: pair[1] for points in found.values() for share, pair in points.items()}
    with pytest.raises(ValueError, match=r"step_time\.md has no row"):
        pictures.speedups("| options |")


def test_memory_is_what_the_planner_says(pictures: ModuleType, capsys: pytest.CaptureFixture) -> None:
    data: dict[str, Any] = pictures.memory()
    panels = pictures.draw_memory(pictures.THEMES[0], data).axes
    assert len(panels) == len(pictures.GPUS) == 2
    for axes, gpus in zip(panels, pictures.GPUS):
        command = ["plan", "--config", str(ROOT / pictures.RUN), "--model", pictures.MODEL, "--gpus", str(gpus)]
        assert main([*command, "--gpu", pictures.GPU, "--json"]) == 0
        layouts = {layout["name"]: layout for layout in json.loads(capsys.readouterr().out)["layouts"]}
        assert list(data["layouts"][gpus]) == list(layouts)
        ends = [0.0] * len(layouts)
        for bars in axes.containers:
            ends = [end + bar.get_width() for end, bar in zip(ends, bars)]
        totals = [layout["bytes_per_gpu"]["total"] for layout in layouts.values()]
        assert ends == pytest.approx([total / 1e9 for total in totals]), "no kind is left out"
        fits = [total <= 1e9 * axes.lines[0].get_xdata()[0] for total in totals]
        assert fits == [layout["fits"] for layout in layouts.values()] and not all(fits), "the line divides them"


def test_the_idea(pictures: ModuleType) -> None:
    """Prompt tokens at the same few channels, answer tokens at all, in each of the three matrices."""
    theme = pictures.THEMES[0]
    cells = {line.get_color(): line.get_xydata() for line in pictures.draw_idea(theme, {}).axes[0].lines[:3]}
    prompt = {x for x, _ in cells[theme.series[0]]}
    kept = {y for _, y in cells[theme.series[0]]}
    assert len(cells[theme.series[0]]) == len(prompt) * len(kept) and len(kept) == 3 * 2
    assert {x for x, _ in cells[theme.faint]} == prompt and not kept & {y for _, y in cells[theme.faint]}
    assert {y for _, y in cells[theme.series[1]]} == kept | {y for _, y in cells[theme.faint]}
    assert min(x for x, _ in cells[theme.series[1]]) > max(prompt)
