"""benchmarks/gpu.py on a CPU: all parts run, and what is wrong is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_kernels import rates

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
pytest.importorskip("triton")


def _run(tmp_path: Path, *options: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    from gpu_report import read_rows

    file = tmp_path / "rows.jsonl"
    result = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--tiny", "--rows", str(file), *options],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **env},
    )
    return result, read_rows(file) if file.is_file() else {}


def test_all_parts_run(gpu: ModuleType, tmp_path: Path) -> None:
    """But whole runs, which test_gpu_train.py looks at."""
    markdown, measured = tmp_path / "rows.md", tmp_path / "rates.json"
    rates.write(measured, "cpu", {})
    parts = "kernels,gradients,profile,steps,liger,ops"
    result, tables = _run(tmp_path, "--parts", parts, "--markdown", str(markdown), **{rates.VARIABLE: str(measured)})
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    assert result.stdout.rstrip().endswith("0 wrong")
    kernels = {row["kernel"].split(" ")[0] for row in tables["kernels"]}
    files = ("score", "select", "nf4", "floats", "fp8", "columns", "indexed_linear", "gated_ffn", "gated_gradient")
    assert {name.split(".")[0] for name in kernels} == set(files)
    assert {row["op"].split(" ")[0] for row in tables["ops"]} >= {"gated_forward", "indexed_nt", "nf4_rows"}
    assert all(row["vendor us"] > 0 for row in tables["ops"] if row["op"].endswith("(grid)"))
    # What it reached is what launchers choose by from now on.
    found = rates.read(measured)
    kinds = {rates.key_of(product, torch.float32, nf4=nf4) for product in rates.PRODUCTS for nf4 in (False, True)}
    assert {name for name in found if found[name] != rates.DEFAULTS[name]} == {*kinds, "vendor 32", "memory", "copy"}
    timed = [(row["pair"], row["batch"], row["checkpointing"]) for row in tables["steps"]]
    assert {pair for pair, *_ in timed} == {"tiny fp32 math", "tiny nf4 math", "tiny fp32 commonsense"}
    assert {batch for _, batch, _ in timed} == {"full", "padded", "packed"}
    assert len(set(timed)) == len(timed) == 10
    assert all(row["speedup"] > 0 and row["ideal"] > 1 and row["right"] for row in tables["steps"])
    assert len(tables["equal memory: dense with checkpointing, sparse without"]) == 5
    assert [row["what"].split(", ")[-1] for row in tables["profile"]] == ["dense", "sparse"]
    assert all(0 <= row["idle share"] < 1 and row["launches"] > 100 for row in tables["profile"])
    assert [row["part"] for row in tables["left out"]] == ["liger"]
    assert markdown.read_text().count("\n## ") == len(tables) - 1  # What it ran with stands above the tables.


def test_memory_agrees_with_the_planner(gpu: ModuleType) -> None:
    from gpu_memory import measure_memory

    rows = measure_memory("tiny", 3, tokens=128, length=64, context=0.75, device=CPU, dtype=torch.float32)
    assert [row["what"].split()[-1] for row in rows] == ["dense", "sparse"]
    for row in rows:
        assert row["fits"] and row["held_gb"] == pytest.approx(row["planned_held_gb"], rel=0.01)
        assert row["planned_peak_gb"] > row["planned_held_gb"]


# --- what is wrong is refused ---------------------------------------------------------------------------------------


def _noise() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.ones(3) + 1e-6 * torch.rand(3), torch.ones(3)


def _failing() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda: [(torch.ones(3), torch.ones(3) + 0.1)], "off by"),
        (lambda: [(torch.tensor([1.0, float("nan")]), torch.ones(2))], "off by inf"),
        (lambda: [(torch.ones(2), torch.ones(3))], "off by inf"),
        (_noise, "two runs differ"),
        (_failing, "RuntimeError: out of registers"),
    ],
)
def test_a_wrong_kernel_is_a_row(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any, told: str, capsys: Any
) -> None:
    """Named at the end, and the rest goes on."""
    import gpu_kernels
    from gpu_report import read_rows

    right = gpu_kernels.Check("right.one", "float32", lambda: [(torch.ones(2), torch.ones(2))], 1e-5)
    wrong = gpu_kernels.Check("wrong.one", "float32", run, 1e-5)
    monkeypatch.setattr(gpu_kernels, "all_checks", lambda device, sizes: iter([wrong, right]))
    file = tmp_path / "rows.jsonl"
    assert gpu.main(["--tiny", "--parts", "kernels,liger", "--rows", str(file)]) == 1
    assert f"1 wrong\n  kernel wrong.one: {told}" in capsys.readouterr().out
    tables = read_rows(file)
    assert [(row["kernel"], row["right"]) for row in tables["wrong kernels"]] == [("wrong.one", False)]
    assert {row["kernel"]: row["wrong"] for row in tables["kernels"]} == {"wrong.one": 1, "right.one": 0}
    assert tables["left out"]


def test_a_wrong_launcher_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks look at what the launchers return, not at what they return again."""
    import gpu_kernel_cases
    import gpu_kernels

    select = gpu_kernel_cases.select
    launch = select.select_channels
    monkeypatch.setattr(select, "select_channels", lambda scores, keep: launch(scores, keep).roll(1))
    checks = gpu_kernel_cases._select_checks(CPU, gpu_kernel_cases.TINY_SIZES)
    wrong = {row["kernel"] for row in gpu_kernels.verify(checks) if row["problem"].startswith("off by")}
    assert "select.select_channels, random, n 21 k 8" in wrong


def test_a_part_that_fails_is_a_row(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu_report import read_rows

    def run_part(part: str, *_: Any) -> None:
        if part == "kernels":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    seen: list[str] = []
    monkeypatch.setattr(gpu, "run_part", lambda part, *rest: (seen.append(part), run_part(part, *rest)))
    assert gpu.main(["--tiny", "--rows", str(tmp_path / "rows.jsonl")]) == 1
    assert seen == list(gpu.PARTS)
    assert [row["part"] for row in read_rows(tmp_path / "rows.jsonl")["parts"]] == ["kernels"]


@pytest.fixture
def models(gpu: ModuleType) -> Any:
    import gpu_steps

    pair = gpu_steps.Pair(shape="tiny", layers=3, storage="plain", setting="math", dtype=torch.float32, length=32)
    return gpu_steps.Models(pair, CPU)


def test_wrong_gradients_are_a_row(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_correct

    row = models.check(tokens=64, context=0.75)
    assert row["right"] and max(row["worst matrix"], row["all"]) < 1e-4
    kept = gpu_correct.selection
    one_off = lambda model: {layer: {g: c ^ 1 for g, c in groups.items()} for layer, groups in kept(model).items()}  # noqa: E731
    monkeypatch.setattr(gpu_correct, "selection", one_off)
    row = models.check(tokens=64, context=0.75)
    assert not row["right"] and row["all"] > 1e-3


def test_out_of_memory_is_a_row(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps

    def step(batch: dict[str, Tensor]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(models.dense, "step", step)
    row = models.measure(gpu_steps.Case(pair=models.pair, tokens=64, context=0.5, checkpointing=False), 0.0)
    assert row["out_of_memory"] == ["dense"] and row["dense_ms"] is row["speedup"] is None
    assert row["sparse_ms"] > 0 and row["repeats"] == 3


def test_waiting_is_an_error_from_the_first_layer_to_the_end_of_backward(models: Any) -> None:
    import gpu_correct

    seen: list[str] = []
    layers = gpu_correct.decoder_layers(models.sparse.model)
    layers[0].module.register_forward_hook(lambda *_: seen.append("layer"))
    first = next(p for p in models.sparse.model.parameters() if p.requires_grad)
    first.register_hook(lambda _: seen.append("backward"))
    gpu_correct.check_no_host_wait(models.sparse, models.batch(64, 0.75), seen.append)
    assert seen == ["error", "layer", "backward", "default"]

    def waits(module: Any, args: Any) -> None:
        raise RuntimeError("called a synchronizing operation")

    seen.clear()
    layers[1].module.register_forward_pre_hook(waits)
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_correct.check_no_host_wait(models.sparse, models.batch(64, 0.75), seen.append)
    assert seen == ["error", "layer", "default"]
