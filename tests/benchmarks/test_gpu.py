"""benchmarks/gpu.py on a CPU: all parts run, and nothing that is wrong gets as far as a timing."""

from __future__ import annotations

import importlib.util
import json
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


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script; its own modules are importable after it."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(tmp_path: Path, *options: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    file = tmp_path / "rows.json"
    result = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--tiny", "--json", str(file), *options],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **env},
    )
    return result, json.loads(file.read_text())["tables"] if file.is_file() else {}


def test_all_parts_run(tmp_path: Path) -> None:
    measured = tmp_path / "rates.json"
    rates.write(measured, "cpu", {})
    result, tables = _run(tmp_path, "--markdown", str(tmp_path / "rows.md"), **{rates.VARIABLE: str(measured)})
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = {row["kernel"].split(" ")[0] for row in tables["kernels"]}
    files = ("score", "select", "nf4", "columns", "indexed_linear", "gated_ffn", "gated_gradient")
    assert {name.split(".")[0] for name in kernels} == set(files)
    assert {row["op"].split(" ")[0] for row in tables["ops"]} >= {"gated_forward", "indexed_nt", "nf4_rows"}
    assert all(row["vendor us"] > 0 for row in tables["ops"] if row["op"].endswith("(grid)"))
    # What it reached is what launchers choose by from now on.
    found = rates.read(measured)
    kinds = {rates.key_of(product, torch.float32, nf4=nf4) for product in rates.PRODUCTS for nf4 in (False, True)}
    assert {name for name in found if found[name] != rates.DEFAULTS[name]} == {*kinds, "vendor 32", "memory", "copy"}
    timed = {(row["pair"], row["checkpointing"]) for row in tables["steps"]}
    assert {pair for pair, _ in timed} == {"tiny fp32 math", "tiny nf4 math", "tiny fp32 commonsense"}
    assert len(timed) == len(tables["steps"]) == 6 and tables["left out"] == []
    assert all(row["speedup"] > 0 and row["ideal"] > 1 for row in tables["steps"])
    assert len(tables["equal memory: dense with checkpointing, sparse without"]) == 3
    assert (tmp_path / "rows.md").read_text().count("\n## ") == len(tables)


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
def test_a_wrong_kernel_is_named_and_ends_it(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any, told: str
) -> None:
    import gpu_kernels

    right = gpu_kernels.Check("right.one", "float32", lambda: [(torch.ones(2), torch.ones(2))], 1e-5)
    wrong = gpu_kernels.Check("wrong.one", "float32", run, 1e-5)
    monkeypatch.setattr(gpu_kernels, "all_checks", lambda device, sizes: iter([right, wrong]))
    with pytest.raises(SystemExit, match=rf"(?s)no timing:\s+wrong.one: .*{told}"):
        gpu.main(["--tiny", "--json", str(tmp_path / "rows.json")])
    assert not (tmp_path / "rows.json").exists()


def test_a_wrong_launcher_is_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks look at what the launchers return, not at what they return again."""
    import gpu_kernels

    launch = gpu_kernels.select.select_channels
    monkeypatch.setattr(gpu_kernels.select, "select_channels", lambda scores, keep: launch(scores, keep).roll(1))
    with pytest.raises(SystemExit, match=r"select.select_channels, random, n 21 k 8: off by"):
        gpu_kernels.verify(gpu_kernels._select_checks(CPU, gpu_kernels.TINY_SIZES))


@pytest.fixture
def models(gpu: ModuleType) -> Any:
    import gpu_steps

    pair = gpu_steps.Pair(shape="tiny", layers=3, storage="plain", setting="math", dtype=torch.float32, length=32)
    return gpu_steps.Models(pair, CPU)


def test_wrong_gradients_end_it(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps

    assert max(models.check(tokens=64, context=0.75)) < 1e-4
    kept = gpu_steps.selection
    one_off = lambda model: {layer: {g: c ^ 1 for g, c in groups.items()} for layer, groups in kept(model).items()}  # noqa: E731
    monkeypatch.setattr(gpu_steps, "selection", one_off)
    with pytest.raises(SystemExit, match=r"wrong gradients, tiny fp32 math: .* no timing"):
        models.check(tokens=64, context=0.75)


def test_out_of_memory_is_a_row(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps

    def step(batch: dict[str, Tensor]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(models.dense, "step", step)
    row = models.measure(gpu_steps.Case(pair=models.pair, tokens=64, context=0.5, checkpointing=False), 0.0)
    assert row["out_of_memory"] == ["dense"] and row["dense_ms"] is row["speedup"] is None
    assert row["sparse_ms"] > 0 and row["repeats"] == 3


def test_waiting_is_an_error_from_the_first_layer_to_the_end_of_backward(models: Any) -> None:
    import gpu_steps

    seen: list[str] = []
    layers = gpu_steps.decoder_layers(models.sparse.model)
    layers[0].module.register_forward_hook(lambda *_: seen.append("layer"))
    first = next(p for p in models.sparse.model.parameters() if p.requires_grad)
    first.register_hook(lambda _: seen.append("backward"))
    gpu_steps.check_no_host_wait(models.sparse, models.batch(64, 0.75), seen.append)
    assert seen == ["error", "layer", "backward", "default"]

    def waits(module: Any, args: Any) -> None:
        raise RuntimeError("called a synchronizing operation")

    seen.clear()
    layers[1].module.register_forward_pre_hook(waits)
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_steps.check_no_host_wait(models.sparse, models.batch(64, 0.75), seen.append)
    assert seen == ["error", "layer", "default"]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_combination_is_a_case_and_the_budget_ends_them(gpu: ModuleType) -> None:
    cases = list(gpu.step_cases(8, torch.bfloat16))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 1 + 2 * 2 * 2 * (3 * 3 * 2)
    assert cases[0].pair.layers == 32 and {case.pair.setting for case in cases[:40]} == {"math"}

    budget = gpu.Budget(100)
    assert budget.allows(1e12)  # Nothing is known yet.
    budget.took(1.0, 10.0)
    assert budget.allows(5.0) and not budget.allows(8.0)


@pytest.mark.parametrize("setting", ["math", "commonsense"])
def test_a_stack_has_the_shares_of_the_published_model(gpu: ModuleType, setting: str) -> None:
    from gpu_models import SETTINGS

    from sparselora_dist import SparseLoRAConfig

    def shares(count: int) -> dict[str, float]:
        layers = SparseLoRAConfig.from_dict({"layers": SETTINGS[setting].layers(count)}).sparsity(count)
        assert all(count - 1 not in by_layer for by_layer in layers.values())
        return {group: len(by_layer) / count for group, by_layer in layers.items()}

    published = {"math": {"ffn": 28 / 32, "qk": 14 / 32, "vo": 14 / 32}}
    published["commonsense"] = {"ffn": 14 / 32, "qk": 11 / 32, "vo": 11 / 32}
    assert shares(32) == published[setting]
    for count in (8, 80):
        assert shares(count) == pytest.approx(published[setting], abs=0.5 / count)
