"""benchmarks/format_quality.py: an arm of every kind on the demo model, with the script's checks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.harness import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("format_quality", ROOT / "benchmarks" / "format_quality.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["format_quality"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_arm_of_every_kind(
    script: ModuleType, quality_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm: Any = script.Arm
    chosen = [
        arm("math", "bf16", "SparseLoRA"),
        arm("math", "billm", "SparseLoRA"),
        arm("math", "bcq 2", "LoRA"),
        arm("math", "bcq 2", "LoRA, LoftQ start"),
    ]
    listed = {a for task in script.TASKS for a in script.arms(task)}
    assert {a.format for a in listed} == set(script.FORMATS) and {a.way for a in listed} == set(script.WAYS)
    monkeypatch.setitem(script.SPARSE, "layers", {"ffn": {"2-3": 0.9}})  # The demo model has five.
    monkeypatch.setattr(script, "arms", lambda task: chosen)
    words = [*quality_options[:-1], "128", "--tasks", "math", "--seeds", "1"]
    for _ in range(2):
        script.main(["run", *words])
    folder = Path(quality_options[quality_options.index("--output") + 1])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [arm(row["task"], row["format"], row["way"]) for row in rows] == chosen, "a second call adds nothing"
    bits = {row["format"]: row["bits"] for row in rows}
    assert bits["bf16"] == 16 and bits["bcq 2"] < bits["billm"] < 6
    before = {row["way"]: row["before"] for row in rows if row["format"] == "bcq 2"}
    assert before["LoRA, LoftQ start"] != before["LoRA"], "another start and another base"
    capsys.readouterr()
    script.main(["table", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("| LoRA, LoftQ start |" in line for line in lines) == 1
