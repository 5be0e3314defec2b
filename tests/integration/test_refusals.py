"""What cannot work is refused before any training step, naming key or file and remedy: model, folders, ranks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig, RwkvForCausalLM

from support.harness import run_launch, run_ranks
from support.merging import make_adapter
from support.models import ATTENTION
from support.refusals import never_loads, says

from .conftest import VOCABULARY, Tiny, byte_tokenizer, task_rows, write_rows

pytestmark = pytest.mark.usefixtures("alone")


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
    folder = tmp_path / "rwkv"
    shape = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64)
    RwkvForCausalLM(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    message = refused("--model.name_or_path", str(folder))
    says(message, "RwkvForCausalLM", "rwkv", "not supported", "RwkvFeedForward")


def test_a_model_that_is_not_there(refused: Callable, tmp_path: Path) -> None:
    says(refused("--model.name_or_path", str(tmp_path / "nothing")), str(tmp_path / "nothing"))


def test_one_process_engine_on_two_ranks(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    says(refused(), "engine.name", "'single'", "2 were started", "'zero3'", "'fsdp2'")


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


def test_ranks_that_differ(tiny: Tiny, tmp_path: Path) -> None:
    """Nodes with another seed, row or weight would train to the end: each is refused on both ranks."""
    rows = task_rows(64, seed=0)
    rows[9]["completion"] += "?"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    shutil.copytree(tiny.model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    make_adapter(tmp_path / "start", Path(tiny.model), target_modules=ATTENTION)
    config = tiny.config("fsdp2", tmp_path / "out")
    changes = [
        {"train": {"seed": 7}},
        {"train": {"max_steps": 9}},
        {"data": {"train": data}},
        {"data": {"eval": data}},
        {"model": {"name_or_path": str(tmp_path / "model")}},
        {"lora": {"init_from": str(tmp_path / "start")}},
    ]
    words = ["train.seed is 7 here, 42 there", "train.max_steps is 9 here, 6 there", "training data is"]
    words += ["evaluation data is", "base model is", "lora.init_from is"]
    first, second = run_ranks("support.trainer_workers:refusals", 2, config, changes, timeout=180)
    for one, other, part in zip(first, second, words, strict=True):
        says(one, "rank 1 on ", " differs from rank 0 on ", part, "the same run file")
        assert one == other
    assert not (tmp_path / "out" / "adapter").exists()


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


def test_the_command_itself_fails_with_the_message(tiny: Tiny, tmp_path: Path) -> None:
    """Through a real process: the status, and the message on standard error without a traceback."""
    config = tiny.config_file(tmp_path / "run.json", "single", tmp_path / "out")
    result = run_launch(["python", "launch/train.py", "--config", config, "--train.sed", "1"], check=False)
    assert result.returncode not in (0, None)
    says(result.stderr, "error:", "train.sed", "did you mean 'seed'")
    assert "Traceback" not in result.stderr
    assert not os.path.exists(tmp_path / "out")
