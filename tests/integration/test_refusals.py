"""What cannot work is refused before any training step, naming the key or file and the remedy."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from support.harness import ROOT, run_launch, run_ranks
from support.models import tiny_base

from .conftest import LAYERS, VOCABULARY, Tiny, byte_tokenizer, task_rows, write_rows

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def main() -> Callable[[], int]:
    """``main`` of ``launch/train.py``, which a subprocess test below runs for real."""
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def refused(
    tiny: Tiny, tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Launch a run that must be refused before its first step; what the user is told."""

    def launch(*argv: str, engine: str = "single", **sections: dict[str, Any]) -> str:
        sections["train"] = {"max_steps": 2, "save_steps": None, **sections.get("train", {})}
        config = tiny.config_file(tmp_path / "run.json", engine, tmp_path / "out", **sections)
        monkeypatch.setattr("sys.argv", ["train.py", "--config", config, *argv])
        # A message and a status, not a traceback.
        assert main() == 2, "the run was not refused"
        message = capsys.readouterr().err
        metrics = tmp_path / "out" / "metrics.jsonl"
        assert not metrics.exists() or '"loss"' not in metrics.read_text()
        assert not (tmp_path / "out" / "adapter").exists()
        return message

    return launch


def says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"the message lacks {missing}:\n{message}"


def test_an_unknown_key_with_the_nearest(refused: Callable) -> None:
    says(refused("--train.learning_rat", "1e-3"), "train.learning_rat", "did you mean", "learning_rate")
    says(refused(sparse_lora={"layres": {}}), "sparse_lora.layres", "did you mean", "layers")
    says(refused("--max_steps", "3"), "--max_steps", "--section.key")


@pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "2"])
def test_a_sparsity_outside_zero_to_one(refused: Callable, sparsity: str) -> None:
    message = refused("--sparse_lora.layers", f'{{"ffn": {{"1-2": {sparsity}}}}}')
    says(message, "sparse_lora.layers.ffn", "1-2", sparsity, "[0, 1)")


def test_a_range_that_the_model_does_not_have(refused: Callable) -> None:
    says(refused(sparse_lora={"layers": {"ffn": {"1-2,7": 0.5}}}), "sparse_lora.layers.ffn", "7", "layers 0-2")
    says(refused(sparse_lora={"layers": {}}), "sparse_lora.layers", "empty", "sparse_lora.enabled")


def test_a_model_that_is_not_supported(refused: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shape = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    says(refused("--model.name_or_path", str(folder)), "GPT2LMHeadModel", "gpt2", "not supported", "llama", "qwen3")


def test_a_model_that_is_not_there(refused: Callable, tmp_path: Path) -> None:
    says(refused("--model.name_or_path", str(tmp_path / "nothing")), str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def factors(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factor file of the tiny model at rank 4, as the cache holds it."""
    from transformers import AutoModelForCausalLM

    from sparselora_dist import SparseLoRAConfig, apply_sparselora

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSELORA_CACHE", str(folder))
        base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype="float32").requires_grad_(False)
        apply_sparselora(base, SparseLoRAConfig(rank=4, layers=LAYERS))
    (path,) = folder.rglob("*.safetensors")
    return path


def test_factors_of_another_rank(refused: Callable, factors: Path) -> None:
    message = refused("--sparse_lora.factors", str(factors), "--sparse_lora.rank", "2")
    says(message, str(factors), "rank 4", "rank 2", "remove sparse_lora.factors")


def test_factors_of_another_model(refused: Callable, factors: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_base(seed=5, vocab_size=VOCABULARY).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    message = refused("--sparse_lora.factors", str(factors), "--model.name_or_path", str(other))
    says(message, str(factors), "another model", str(other), "sparse_lora.factors")


def test_factors_that_lack_a_layer(refused: Callable, factors: Path) -> None:
    message = refused(sparse_lora={"factors": str(factors), "layers": {"ffn": {"0-2": 0.5}}})
    says(message, str(factors), "layers.0.mlp.gate_proj", "remove sparse_lora.factors")


def test_a_truncated_factor_file(refused: Callable, factors: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(factors.read_bytes()[:-100])
    says(refused("--sparse_lora.factors", str(broken)), str(broken), "truncated")
    content = bytearray(factors.read_bytes())
    content[-3] ^= 0x55
    broken.write_bytes(content)
    says(refused("--sparse_lora.factors", str(broken)), str(broken), "damaged", "SHA-256")
    says(refused("--sparse_lora.factors", str(tmp_path / "none.safetensors")), "none.safetensors")


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


def test_one_process_engine_on_two_ranks(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    says(refused(), "engine.name", "'single'", "2 were started", "'zero3'", "'fsdp2'")


def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sparselora_dist.train.run")
    monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("key", ["train.output_dir", "train.logging_dir"])
def test_a_folder_that_cannot_be_written(
    refused: Callable, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the model is loaded, where a file is in the way or above, or the system refuses."""
    never_loads(monkeypatch)
    (tmp_path / "file").write_text("mine")
    for folder, why in ((tmp_path / "file", "it is a file"), (tmp_path / "file" / "out", "Not a directory")):
        says(refused(f"--{key}", str(folder)), f"'{key}' is {folder}", "nothing can be written", why, "another folder")
    assert (tmp_path / "file").read_text() == "mine"

    make = tempfile.NamedTemporaryFile

    def locked(*, dir: Path, **options: Any) -> Any:
        if dir.name == "locked":
            raise PermissionError(13, "Permission denied")
        return make(dir=dir, **options)

    monkeypatch.setattr("tempfile.NamedTemporaryFile", locked)
    says(refused(f"--{key}", str(tmp_path / "locked")), f"'{key}'", str(tmp_path), "Permission denied")


def test_every_rank_ends_when_the_first_cannot_write(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny.config("fsdp2", tmp_path / "file")
    first, second = run_ranks(
        "support.trainer_workers:many_runs", 2, [(config, None)], None, timeout=120, expect_failure=True
    )
    says(first, "'train.output_dir'", "it is a file")
    says(second, "OtherRankError", "rank 0 could not go on", "'train.output_dir'")


def test_a_tracker_that_is_not_installed(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    never_loads(monkeypatch)
    monkeypatch.setattr("sparselora_dist.train.trackers.get_available_trackers", lambda: [])
    says(refused("--train.report_to", "wandb"), "'train.report_to'", "wandb", "pip install wandb")


def test_resume_without_a_checkpoint(refused: Callable, tmp_path: Path) -> None:
    says(refused("--train.resume", "true"), "train.resume", str(tmp_path / "out"), "no checkpoint", "start anew")
    says(refused("--train.resume", str(tmp_path)), "train.resume", str(tmp_path), "not a checkpoint")


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a checkpoint at its 2nd and last step."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    folder = tmp_path_factory.mktemp("finished") / "out"
    run(RunConfig.from_dict(tiny.config("single", folder, train={"max_steps": 2})))
    return folder


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


def test_ranks_that_differ(tiny: Tiny, tmp_path: Path) -> None:
    """Nodes with another seed, row or weight would train to the end: each is refused on both ranks."""
    rows = task_rows(64, seed=0)
    rows[9]["completion"] += "?"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    shutil.copytree(tiny.model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = tiny.config("fsdp2", tmp_path / "out")
    changes = [
        {"train": {"seed": 7}},
        {"train": {"max_steps": 9}},
        {"data": {"train": data}},
        {"data": {"eval": data}},
        {"model": {"name_or_path": str(tmp_path / "model")}},
    ]
    words = ["train.seed is 7 here, 42 there", "train.max_steps is 9 here, 6 there", "training data is"]
    words += ["evaluation data is", "base model is"]
    first, second = run_ranks("support.trainer_workers:refusals", 2, config, changes, timeout=180)
    for one, other, part in zip(first, second, words, strict=True):
        says(one, "rank 1 on ", " differs from rank 0 on ", part, "the same run file")
        assert one == other
    assert not (tmp_path / "out" / "adapter").exists()


def test_rows_longer_than_the_model_reaches(refused: Callable, tiny: Tiny, tmp_path: Path) -> None:
    says(refused("--data.max_length", "129"), "'data.max_length' is 129", "128 positions", "from 2 to 128")
    base = tmp_path / "stretched"
    shutil.copytree(tiny.model, base)
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "rope_scaling": rope}))
    says(refused("--model.name_or_path", str(base), "--data.max_length", "257"), "'data.max_length'", "256 positions")


def test_no_room_for_a_checkpoint(
    refused: Callable, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said before the model is loaded, in bytes; what is estimated is what a checkpoint takes."""
    from sparselora_dist.train import disk

    never_loads(monkeypatch)
    free = 10_000
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    message = refused("--train.save_steps", "1")
    says(message, f"'train.output_dir' is {tmp_path / 'out'} with 10,000 bytes free", "make room")
    need = int(message.split("one checkpoint takes ")[1].split()[0].replace(",", ""))
    actual = sum(path.stat().st_size for path in (finished / "checkpoint-2").rglob("*") if path.is_file())
    assert 0.8 * actual < need < 1.5 * actual
    free = need + 100
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        refused("--train.save_steps", "1")
    assert "2 checkpoints of" in caplog.text and "train.save_total_limit" in caplog.text


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


def test_two_runs_in_one_folder(refused: Callable, tmp_path: Path) -> None:
    from sparselora_dist.io.run_lock import RunLock

    (tmp_path / "out").mkdir()
    lock = RunLock.take(tmp_path / "out")
    try:
        says(
            refused(),
            f"'train.output_dir' is {tmp_path / 'out'}",
            f"process {os.getpid()} on",
            "two runs in one folder",
        )
    finally:
        lock.close()
    with pytest.raises(AssertionError, match="was not refused"):
        refused()


def test_a_model_that_brings_code(refused: Callable, tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.model, base)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}
    (base / "config.json").write_text(json.dumps(config))
    says(refused("--model.name_or_path", str(base)), f"config.json of {base}", "'auto_map': m.C", "never run")


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


def test_the_command_itself_fails_with_the_message(tiny: Tiny, tmp_path: Path) -> None:
    """Through a real process: the status, and the message on standard error without a traceback."""
    config = tiny.config_file(tmp_path / "run.json", "single", tmp_path / "out")
    result = run_launch(["python", "launch/train.py", "--config", config, "--train.sed", "1"], check=False)
    assert result.returncode not in (0, None)
    says(result.stderr, "error:", "train.sed", "did you mean 'seed'")
    assert "Traceback" not in result.stderr
    assert not os.path.exists(tmp_path / "out")
