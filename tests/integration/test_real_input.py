"""A real model on real data: one process, ZeRO-3 and FSDP2 take the same steps. The long runs are not made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.harness import run_ranks
from support.trainer_workers import observe

pytestmark = pytest.mark.usefixtures("alone")
IDS = torch.arange(10, 42).reshape(2, 16)
STEPS = 6
SPARSE = {"start_step": 1, "layers": {"ffn": {"2-6": 0.9}, "qk": {"3-6": 0.5}, "vo": {"3-6": 0.5}}}


@pytest.fixture(scope="module")
def runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Six steps of eight rows by each engine, and densely by one process."""
    folder = tmp_path_factory.mktemp("real")

    def config(name: str, engine: str) -> dict[str, Any]:
        return {
            "model": {"name_or_path": str(shared / "models" / "base-9m"), "dtype": "float32"},
            "sparse_lora": {"enabled": name != "dense", **SPARSE},
            "data": {
                "train": str(shared / "data" / "math" / "train.jsonl"),
                # One process is enough to see it fall; the engines' evaluation is compared on the tiny model.
                "eval": str(shared / "data" / "math" / "eval.jsonl") if engine == "single" else None,
                "max_length": 256,
                "train_limit": 400,
                "eval_limit": 16,
            },
            "train": {
                "output_dir": str(folder / name),
                "max_steps": STEPS,
                "learning_rate": 2e-3,
                "per_device_train_batch_size": 8 if engine == "single" else 4,
                "disable_tqdm": True,
            },
            "engine": {"name": engine},
        }

    results = {name: observe(config(name, "single"), IDS) for name in ("single", "dense")}
    jobs = [(config(engine, engine), None) for engine in ("fsdp2", "zero3")]
    ranks = run_ranks("support.trainer_workers:many_runs", 2, jobs, IDS, timeout=300)
    return folder, results | {"fsdp2": ranks[0][0], "zero3": ranks[0][1]}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_engines_take_the_same_steps(
    engine: str, runs: tuple[Path, dict[str, dict[str, Any]]], rows_of: Callable
) -> None:
    folder, results = runs
    expected, got = rows_of(folder / "single"), rows_of(folder / engine)
    assert len(got) == STEPS
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    differing = kept = 0
    for one, other in zip(results["single"]["masks"], results[engine]["masks"], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            # A channel whose score differs from the next one's by less than the summation error may change places.
            differing += len(set(one[key].tolist()) ^ set(other[key].tolist())) // 2
            kept += one[key].numel()
    assert kept == (STEPS - 1) * (5 * 103 + 4 * (16 + 32))
    assert differing < 1e-3 * kept, f"{differing} of {kept} channels differ"


def test_it_learns_and_costs_little(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, results = runs
    sparse, dense = results["single"]["summary"], results["dense"]["summary"]
    for result in (sparse, dense):
        assert result["eval_loss"] < result["eval_loss_start"]
    assert sparse["eval_loss"] == pytest.approx(dense["eval_loss"], rel=0.01)
    # Dense, the LM head and the last layer are spared, where no label is.
    assert sparse["executed_flops_share"] < 0.75 < dense["executed_flops_share"] < 0.95
