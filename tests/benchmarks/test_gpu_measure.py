"""What benchmarks/gpu.py measures, in which order, how long, and how it is timed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
pytest.importorskip("triton")


def test_every_combination_is_a_case(gpu: ModuleType) -> None:
    from gpu_step_cases import step_cases

    cases = list(step_cases(8, torch.bfloat16))
    names = [case.name for case in cases]
    kinds, contexts = 4, 3
    full = 1 + 2 * kinds * 2 * (contexts * 3) + 2 * kinds + 1  # Few context tokens, once.
    assert len(set(names)) == len(names) == full + 2 * kinds * 2 * 2
    assert cases[0].pair.layers == 32 and {case.pair.setting for case in cases[:40]} == {"math"}
    first = cases[1:10]
    assert {case.pair.name for case in first} == {"8b bf16 math"}
    assert {case.tokens for case in first} == {2048, 8192, 16384} and {case.context for case in first} == {
        0.25,
        0.5,
        0.75,
        1.0,
    }
    assert {case.pair.name for case in cases[:14]} >= {"70b nf4 math"} and {case.batch for case in cases[:14]} == {
        "full",
        "packed",
    }


def test_the_budget_ends_them(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves when it is told to."""
    import gpu_report
    import gpu_step_cases

    now = [0.0]
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: now[0])
    budget = gpu.Budget(100)
    assert budget.allows(1e12)  # Nothing is known yet.
    budget.took(1.0, 10.0)
    assert budget.allows(6.0) and not budget.allows(7.0)
    now[0] = 60.0
    assert budget.left == 40.0 and not budget.allows(3.0) and budget.share(0.25).left == 10.0

    class Slow:
        def __init__(self, pair: Any, device: Any) -> None:
            self.pair, self.sparse = pair, self
            self.dense, self.checkpointing = self, lambda on: None

        def check(self, *_: Any) -> dict[str, Any]:
            return {"what": self.pair.name, "right": False}

        def measure(self, case: Any, seconds: float) -> dict[str, Any]:
            now[0] += 50.0
            same = {"pair": "", "layers": "", "tokens": 0, "batch": "", "context": 0}
            return {**same, "checkpointing": case.checkpointing, "dense_ms": 1.0}

    monkeypatch.setattr(gpu_step_cases, "Models", Slow)
    monkeypatch.setattr(gpu_step_cases, "drop", lambda models: None)
    monkeypatch.setattr(gpu_step_cases, "equal_memory", lambda rows: [])
    report = gpu.Report({})
    cases = list(gpu_step_cases.step_cases(3, torch.float32, tiny=True))
    cases = [case for case in cases if case.tokens == 128 and case.pair.storage == "plain"]
    gpu_step_cases.time_steps(report, cases, gpu.Budget(100), CPU)
    # The wrong pair is measured all the same, and every row says so.
    assert [row["right"] for row in report.tables["steps"]] == [False]
    assert report.wrong and len(report.tables["left out"]) == len(cases) - 1
    assert {row["why"] for row in report.tables["left out"]} == {"no time left"}


def test_rows_are_on_the_disk_as_they_come(gpu: ModuleType, tmp_path: Path) -> None:
    from gpu_report import read_rows

    file = tmp_path / "new" / "rows.jsonl"
    report = gpu.Report({"device": "one"}, str(file))
    report.add("steps", {"ms": 1.5})
    assert read_rows(file) == {"about": [{"device": "one"}], "steps": [{"ms": 1.5}]}
    gpu.Report({"device": "two"}, str(file)).judge("runs", {"what": "it"}, "it is wrong", False)
    file.write_text(file.read_text() + '{"table": "steps", "m')  # Cut off.
    tables = read_rows(file)
    assert [row["device"] for row in tables["about"]] == ["one", "two"]
    assert tables["steps"] == [{"ms": 1.5}] and tables["runs"] == [{"what": "it", "right": False}]


def test_short_work_hides_behind_a_sleeping_kernel(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock starts when the host has launched; a step's launches are part of it."""
    from types import SimpleNamespace

    import gpu_timing

    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    device: Any = SimpleNamespace(type="cuda")
    assert gpu_timing.timed(lambda: order.append("work"), device, hide=True) == 3e-3
    assert order == ["sleep", "record", "work", "record", "wait"]
    order.clear()
    gpu_timing.timed(lambda: order.append("work"), device)
    assert order == ["record", "work", "record", "wait"]


def test_idle_is_where_no_kernel_runs(gpu: ModuleType) -> None:
    import gpu_profile

    events = [
        {"name": "gemm", "ts": 100.0, "dur": 30},
        {"name": "norm", "ts": "110", "dur": 10},  # On another stream, inside the first.
        {"name": "gemm", "ts": 160, "dur": 20.0},
        {"name": "norm", "ts": 175, "dur": 25},
    ]
    found = gpu_profile.summary(events)
    assert found == {"ms": pytest.approx(0.1), "launches": 4, "idle share": pytest.approx(0.3)}
    best, other = gpu_profile.top(events)
    assert best == {"kernel": "gemm", "launches": 2, "us": 50.0, "share": pytest.approx(50 / 85)}
    assert other["us"] == 35.0
    assert gpu_profile.summary([])["idle share"] is None


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
def test_batches(gpu: ModuleType, kind: str) -> None:
    """As many real tokens, the same share of context; a packed row's first token carries no label of its neighbour."""
    from gpu_sides import make_batch

    from sparselora_dist.method.tokens import partition_tokens

    batch = make_batch(100, 1024, 64, 0.75, CPU, kind)
    split = partition_tokens(batch["labels"], batch.get("attention_mask"))
    real = split.dense.numel() + split.context.numel()
    assert 1024 <= real < 1024 + 64
    assert split.context.numel() / real == pytest.approx(0.75, abs=0.02)
    if kind == "packed":
        begins = batch["position_ids"] == 0
        assert batch["input_ids"].shape[0] == 1 and begins.sum() > 16
        assert (batch["labels"][begins] == -100).all()
    elif kind == "padded":
        assert (batch["attention_mask"] == 0).any() and (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    else:
        assert set(batch) == {"input_ids", "labels"} and batch["labels"].shape == (16, 64)


def test_plain_peft_is_measured_as_it_is(gpu: ModuleType) -> None:
    """Without Liger, which needs a GPU: the script's own part."""
    import gpu_liger

    rows = list(gpu_liger.measure("tiny", 2, 32, [64], CPU, torch.float32, 60.0))
    assert [row["checkpointing"] for row in rows] == [True, False] and all(row["ms"] > 0 for row in rows)
    rows = list(gpu_liger.measure("tiny", 2, 32, [64], CPU, torch.float32, -1.0))
    assert {row["why"] for row in rows} == {"no time left"}


@pytest.mark.parametrize("setting", ["math", "commonsense"])
def test_a_stack_has_the_shares_of_the_published_model(gpu: ModuleType, setting: str) -> None:
    from gpu_models import SETTINGS

    from sparselora_dist import SparseLoRAConfig

    def shares(count: int) -> dict[str, float]:
        layers = SparseLoRAConfig.from_dict({"layers": SETTINGS[setting].layers(count)}).sparsity(count)
        assert all(count - 1 not in by_layer for by_layer in layers.values())
        return {group: len(by_layer) / count for group, by_layer in layers.items() if by_layer}

    published = {"math": {"ffn": 28 / 32, "qk": 14 / 32, "vo": 14 / 32}}
    published["commonsense"] = {"ffn": 14 / 32, "qk": 11 / 32, "vo": 11 / 32}
    assert shares(32) == published[setting]
    for count in (8, 80):
        assert shares(count) == pytest.approx(published[setting], abs=0.5 / count)
