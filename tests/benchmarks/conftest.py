"""benchmarks/gpu.py as a module; what the quality benchmarks run on in small."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest

from support.harness import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
NAMES = ("boolq_{}", "arc_easy_{}", "openbookqa_{}")


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    """The script; its own modules are importable after it."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Demo rows in the places of the real ones."""
    data = tmp_path_factory.mktemp("data")
    for source, names in (("train", ("math/train",)), ("eval", ("math/eval",))):
        lines = (ROOT / "demo" / "data" / f"{source}.jsonl").read_text().splitlines()[:40]
        found = [(row["prompt"], row["completion"]) for row in map(json.loads, lines)]
        rows = "".join(json.dumps({"instruction": asked, "output": answer}) + "\n" for asked, answer in found)
        split = "test" if source == "eval" else "train"
        for name in (*names, *(f"commonsense/{name.format(split)}" for name in NAMES)):
            path = data / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(rows)
    words = ["--model", str(ROOT / "demo" / "model"), "--data", str(data), "--output", str(data / "out")]
    return [*words, "--steps", "2", "--batch", "4", "--eval-rows", "6", "--sequences", "2", "--max-length", "160"]
