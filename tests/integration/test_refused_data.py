"""Data that cannot be trained on is refused by name, and what cannot be helped in a batch contributes nothing."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.refusals import says

from .conftest import Tiny, task_rows, write_rows

pytestmark = pytest.mark.usefixtures("alone")


def test_a_row_with_neither_known_fields_nor_text(refused: Callable, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "odd.jsonl", [{"question": "1 + 1", "answer": "2"}])
    says(refused("--data.train", path), f"{path}:1", "question", "answer", "accepted layouts", "prompt/completion")
    path = write_rows(tmp_path / "mixed.jsonl", [*task_rows(2, seed=0), {"prompt": "but no answer"}])
    says(refused("--data.train", path), f"{path}:3", "prompt/completion")


def test_an_empty_dataset(refused: Callable, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    says(refused("--data.train", str(path)), str(path), "data.train", "empty")
    says(refused("--data.eval", str(path)), str(path), "data.eval", "empty")
    missing = str(tmp_path / "missing.jsonl")
    says(refused("--data.train", missing), missing, "data.train", "does not exist")


def test_a_dataset_without_any_label(refused: Callable) -> None:
    says(refused("--data.max_length", "6"), "data.train", "no row", "max_length 6")


def test_rows_longer_than_the_model_reaches(refused: Callable, tiny: Tiny, tmp_path: Path) -> None:
    says(refused("--data.max_length", "129"), "'data.max_length' is 129", "128 positions", "from 2 to 128")
    base = tmp_path / "stretched"
    shutil.copytree(tiny.model, base)
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "rope_scaling": rope}))
    says(refused("--model.name_or_path", str(base), "--data.max_length", "257"), "'data.max_length'", "256 positions")


def test_a_batch_without_any_label_warns_and_contributes_nothing(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, rows_of: Callable
) -> None:
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    # Half of the prompts fill max_length, so that their completion is cut off.
    rows = [row | {"prompt": row["prompt"] + "x" * 60 * (i % 2)} for i, row in enumerate(task_rows(8, seed=3))]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows), "eval": None}
    train = {"max_steps": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    train |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        run(RunConfig.from_dict(tiny.config("single", tmp_path / "out", data=data, train=train)))
    lines = rows_of(tmp_path / "out")
    idle = [row["step"] for row in lines if row["loss"] == 0]
    assert len(lines) == 8 and len(idle) == 4
    assert all(math.isfinite(value) for row in lines for value in row.values())
    warned = [record.getMessage() for record in caplog.records if "every label is -100" in record.getMessage()]
    assert [message.split(":")[0] for message in warned] == [f"step {step}" for step in idle]
    assert any("4 rows have no label left" in record.getMessage() for record in caplog.records)

    def adapter(step: int) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter" / "adapter_model.safetensors")

    for step in range(2, 9):
        before, after = adapter(step - 1), adapter(step)
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert all(torch.equal(before[name], after[name]) for name in after) == (step in idle), step
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "state.json").read_text())
    assert (state["step"], state["optimizer_steps"]) == (8, 4)


def test_a_micro_batch_without_labels_beside_one_with(tiny: Tiny, tmp_path: Path, rows_of: Callable) -> None:
    """Accumulated over micro-batches of one row, some of them without a label: the loss is that of one big batch."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    rows = [row | {"prompt": row["prompt"] + "x" * 60 * (i % 3 == 0)} for i, row in enumerate(task_rows(12, seed=4))]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows), "eval": None}
    losses = []
    for size in (1, 6):
        train = {"max_steps": 4, "per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
        train |= {"save_steps": None, "group_by_length": False}
        # Dense: the micro-batches of a step choose their own channels.
        config = tiny.config("single", tmp_path / str(size), data=data, train=train, sparse_lora={"enabled": False})
        run(RunConfig.from_dict(config))
        losses.append([row["loss"] for row in rows_of(tmp_path / str(size))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    sparse = tiny.config("single", tmp_path / "sparse", data=data, train=train | {"per_device_train_batch_size": 1})
    run(RunConfig.from_dict(sparse))
    assert all(math.isfinite(row["loss"]) for row in rows_of(tmp_path / "sparse"))
