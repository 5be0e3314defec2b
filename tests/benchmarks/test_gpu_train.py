"""The part ``train`` of benchmarks/gpu.py on a CPU: launch/train.py on every engine, compared with its reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("gpu")  # Makes its modules importable.


def report() -> Any:
    from gpu_report import Report

    return Report({})


def test_every_engine_learns_what_the_cpu_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_train
    from gpu_report import Budget

    monkeypatch.setattr(gpu_train, "STEPS", 4)
    # DeepSpeed builds with the ninja beside the interpreter.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    found = report()
    gpu_train.time_runs(found, Budget(500), tiny=True)
    rows = found.tables["runs"]
    assert [row["engine"] for row in rows] == ["single", "single", "fsdp2", "zero3"], rows
    assert all(row["right"] and row["tokens/s"] > 0 and not row["problem"] for row in rows), rows
    assert all(row["loss apart"] < 1e-4 for row in rows[1:]) and not found.wrong


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_goes_wrong_is_a_row(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    import gpu_train
    from gpu_report import Budget

    answers: dict[tuple[str, bool], tuple[dict[str, Any], list[float]]] = {
        ("single", True): ({"seconds": 1.0, "problem": ""}, [2.0, 1.0]),
        ("single", False): ({"seconds": 1.0, "problem": ""}, [2.0, 1.001]),
        ("fsdp2", False): ({"seconds": 1.0, "problem": "1: error: no NCCL"}, []),
        ("zero3", False): ({"seconds": 1.0, "problem": ""}, [2.0, 1.1]),
    }
    monkeypatch.setattr(gpu_train, "run", lambda engine, words, cpu, *_: answers[engine, cpu])
    monkeypatch.setattr(gpu_train, "has", lambda package: package != "bitsandbytes")
    monkeypatch.setattr(gpu_train, "variants", lambda tiny: [gpu_train.Variant(), gpu_train.Variant(nf4=True)])
    found = report()
    gpu_train.time_runs(found, Budget(500), tiny=False, at_once=at_once)
    assert [(row["engine"], row["on"], row["right"]) for row in found.tables["runs"]] == [
        ("single", "CPU", True), ("single", "GPU", True), ("fsdp2", "GPU", False), ("zero3", "GPU", False),
    ]  # fmt: skip
    assert len(found.wrong) == 2 and "no NCCL" in found.wrong[0] and "loss apart 0.1" in found.wrong[1]
    assert found.tables["left out"] == [
        {"part": "train", "what": "demo, nf4, 16 rows", "why": "bitsandbytes is not installed"}
    ]


def test_a_run_that_fails_says_why_and_one_that_hangs_is_ended() -> None:
    import gpu_train

    row, losses = gpu_train.run("single", ["--train.no_such_key", "1"], True, 60.0)
    assert losses == [] and row["problem"].startswith("2: error: ") and "no_such_key" in row["problem"]
    row, losses = gpu_train.run("single", [], True, 1.0)
    assert losses == [] and row["problem"].startswith("no time left after 1 s")


def test_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is one that a run understands."""
    import gpu_train

    from sparselora_dist.config.run import RunConfig

    found = list(gpu_train.variants(False))
    assert len({variant.name for variant in found}) == len(found)
    assert {variant.packing for variant in found} == {None, True, False}
    assert {variant.rows * gpu_train.ROW_TOKENS for variant in found} >= {1024, 2048, 8192, 16384}
    for engine in gpu_train.ENGINES:
        for variant in found:
            words = [*gpu_train.model_overrides("demo/model", "rows.jsonl"), *variant.overrides()]
            config = RunConfig.from_file(ROOT / "configs" / f"{engine}_sparse.json", words)
            assert config.quantization.load_in_4bit == variant.nf4 and config.data.train == "rows.jsonl"
    assert gpu_train.apart([1.0], []) == float("inf")
