"""benchmarks/pruned_quality.py and masked_gradient.py: an arm of every kind on the demo model, with the scripts' checks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.harness import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """pruned_quality.py; its neighbours are importable after it."""
    spec = importlib.util.spec_from_file_location("pruned_quality", ROOT / "benchmarks" / "pruned_quality.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["pruned_quality"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_arm_of_every_kind(
    script: ModuleType, quality_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm: Any = script.Arm
    chosen = [
        *(arm("general", base, "untuned") for base in ("dense", "magnitude 2:4")),
        *(
            arm("general", *pair)
            for pair in (("dense", "plain"), ("magnitude 2:4", "plain"), ("magnitude 2:4", "masked"))
        ),
        arm("math", "wanda 0.5", "masked + SparseLoRA"),
    ]
    listed = {a for group in script.GROUPS for a in script.arms(group)}
    assert {a.way for a in listed} == set(script.WAYS)
    assert {a.base for a in listed} == {"dense", *script.BASES, "wanda 0.7"}
    sparse = script.WAYS["masked + SparseLoRA"]["sparse_lora"]
    monkeypatch.setitem(sparse, "layers", {"ffn": {"2-3": 0.9}})  # The demo model has five.
    monkeypatch.setattr(script, "arms", lambda group: chosen if group == "general" else [])
    folder = Path(quality_options[quality_options.index("--output") + 1])
    for _ in range(2):
        script.main(["run", *quality_options, "--seeds", "1"])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [arm(row["task"], row["base"], row["way"]) for row in rows] == chosen, "a second call adds nothing"
    filled = {row["way"]: row["filled"] for row in rows if "filled" in row}
    assert filled["plain"] > 0 and filled["masked"] == filled["masked + SparseLoRA"] == 0
    with pytest.raises(SystemExit, match="other settings"):
        script.main(["run", *quality_options, "--learning-rate", "0.5"])
    capsys.readouterr()
    script.main(["table", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("| magnitude 2:4 | masked |" in line and line.endswith("| 0 |  |") for line in lines) == 1


def test_what_fills_zeros_is_seen(script: ModuleType) -> None:
    base, merged = (torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])}) for _ in range(2))
    for model, value in ((base, 0.0), (merged, 1.0)):
        model["layers"][0].weight.data.fill_(1.0)[0, :2] = value
    model, other = (torch.nn.ModuleDict({"model": m}) for m in (merged, base))
    assert script.put_zeros_back(model, other) == 2 and script.put_zeros_back(model, other) == 0


def test_the_librarys_gradients_are_the_formulas(
    script: ModuleType, quality_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import masked_gradient

    masked_gradient.main([*quality_options, "--bases", "magnitude 0.5"])
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split("|")[2:5] for line in lines if line.startswith("| magnitude 0.5 |")]
    assert [(start.strip(), steps.strip()) for start, steps, _ in cells] == [
        ("Kaiming", "0"), ("Kaiming", "2"), ("gradient", "0"), ("gradient", "2"),
    ]  # fmt: skip
    assert all(0 < float(cosine) <= 1 for *_, cosine in cells)
