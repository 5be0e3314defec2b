"""What a folder or a checkpoint holds is not continued by another run, nor written over; and what is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.refusals import never_loads, says

from .conftest import Tiny, task_rows, write_rows

pytestmark = pytest.mark.usefixtures("alone")


def test_resume_without_a_checkpoint(refused: Callable, tmp_path: Path) -> None:
    says(refused("--train.resume", "true"), "train.resume", str(tmp_path / "out"), "no checkpoint", "start anew")
    says(refused("--train.resume", str(tmp_path)), "train.resume", str(tmp_path), "not a checkpoint")


def test_resume_with_another_global_batch(refused: Callable, finished: Path) -> None:
    words = ["--train.resume", str(finished / "checkpoint-2"), "--train.max_steps", "4"]
    message = refused(*words, "--train.gradient_accumulation_steps", "1")
    says(message, "checkpoint-2", "global batch of 8", "4", "gradient_accumulation_steps", "make them equal")


def test_resume_beyond_the_end(refused: Callable, finished: Path) -> None:
    message = refused("--train.resume", str(finished / "checkpoint-2"), "--train.max_steps", "1")
    says(message, "checkpoint-2", "step 2", "1 steps")


@pytest.mark.parametrize(
    ("section", "key", "value", "was"),
    [
        ("train", "seed", 7, 42),
        ("train", "learning_rate", 1e-4, 5e-3),
        ("data", "max_length", 40, 48),
        ("lora", "lora_alpha", 16, 8),
        ("lora", "lora_dropout", 0.1, 0.0),
        (
            "sparse_lora",
            "layers",
            {"ffn": {"1-2": 0.8}},
            {"ffn": {"1": 0.7, "2": 0.7}, "qk": {"1": 0.5}, "vo": {"2": 0.5}},
        ),
        ("sparse_lora", "enabled", False, True),
        ("sparse_base", "enabled", True, False),
        ("quantization", "load_in_4bit", True, False),
        ("model", "dtype", "bfloat16", "float32"),
    ],
)
def test_resume_with_other_settings(
    refused: Callable, finished: Path, section: str, key: str, value: Any, was: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_loads(monkeypatch)
    words = ["--train.resume", str(finished / "checkpoint-2"), "--train.max_steps", "4"]
    message = refused(*words, f"--{section}.{key}", json.dumps(value))
    says(message, "checkpoint-2 was trained with other settings", f"{section}.{key} is", f"{json.dumps(was)} there")


def test_resume_with_other_data_or_weights(refused: Callable, finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    words = ["--train.resume", str(finished / "checkpoint-2"), "--train.max_steps", "4"]
    rows = task_rows(64, seed=0)
    rows[5]["completion"] += "?"
    says(
        refused(*words, "--data.train", write_rows(tmp_path / "rows.jsonl", rows)),
        "training data is",
        "64 rows, SHA-256",
    )
    for change in ("weights", "config"):
        base = tmp_path / change
        shutil.copytree(tiny.model, base)
        if change == "weights":
            tensors = load_file(base / "model.safetensors")
            tensors["model.layers.2.mlp.down_proj.weight"].mul_(1.01)
            save_file(tensors, base / "model.safetensors", {"format": "pt"})
        else:
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
        message = refused(*words, "--model.name_or_path", str(base))
        says(message, "base model is", "SHA-256")
        assert "training data" not in message


def test_what_may_change_on_the_way(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    """Length, saving, batches of an equal global batch, the model's path; lora spelled out with its defaults."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    shutil.copytree(tiny.model, tmp_path / "moved")
    train = {"max_steps": 3, "save_steps": 1, "logging_steps": 2, "gradient_accumulation_steps": 4}
    train |= {"per_device_train_batch_size": 2, "resume": str(finished / "checkpoint-2")}
    lora = {"lora_dropout": 0.0, "target_modules": ["v_proj", "k_proj", "o_proj", "q_proj"]}
    model = {"name_or_path": str(tmp_path / "moved")}
    config = tiny.config("single", tmp_path / "out", train=train, lora=lora, model=model, data={"eval": None})
    assert run(RunConfig.from_dict(config))["steps"] == 3


def test_an_abandoned_branch_is_not_continued(tiny: Tiny, finished: Path, tmp_path: Path, rows_of: Callable) -> None:
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    def go(resume: bool | str, steps: int) -> list[int]:
        train = {"max_steps": steps, "save_steps": 1, "resume": resume}
        run(RunConfig.from_dict(tiny.config("single", folder, train=train, data={"eval": None})))
        return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))

    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    assert go(True, 4) == [2, 3, 4]
    left = (folder / "checkpoint-4" / "state.json").read_bytes()
    assert go(str(folder / "checkpoint-2"), 3) == [2, 3]
    assert (folder / "abandoned-1" / "checkpoint-4" / "state.json").read_bytes() == left
    assert [row["step"] for row in rows_of(folder / "abandoned-1")] == [1, 2, 3, 4]
    assert go("auto", 5) == [2, 3, 4, 5]
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4, 5]
    assert not (folder / "abandoned-2").exists()


def test_a_finished_folder(refused: Callable, tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    """Without a checkpoint to continue; of one with, the next test."""
    folder = tmp_path / "done"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for resume in ("false", "auto"):
        message = refused("--train.output_dir", str(folder), "--train.resume", resume)
        says(message, str(folder), "holds a finished run", "summary.json", "another folder")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")
    message = refused("--train.output_dir", str(folder), "--train.resume", "auto")
    says(message, "records 2 steps", "checkpoint-2, the newest of this run, is gone", "not mounted")
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def test_a_fresh_run_does_not_mix_its_checkpoints_with_another_runs(refused: Callable, finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    says(
        refused("--train.output_dir", str(finished)),
        str(finished),
        "checkpoint-2",
        "train.resume true",
        "another folder",
    )
    assert sorted(path.name for path in finished.iterdir()) == before


def test_resume_of_a_damaged_checkpoint(refused: Callable, finished: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", damaged)
    file = damaged / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    says(refused("--train.resume", "true"), str(file), "damaged", "SHA-256", "older checkpoint")
    file.unlink()
    says(refused("--train.resume", "true"), str(file), "missing")
