"""Checkpoints: whole or not at all, and never continued from by mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from sparselora_dist.io import checkpoint as module
from sparselora_dist.io.adapter import ADAPTER_FILE, load_adapter, save_adapter
from sparselora_dist.io.checkpoint import (
    Checkpoint,
    RunState,
    list_checkpoints,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from sparselora_dist.io.manifest import CorruptFileError
from support.models import batch, tiny_base, tiny_lora


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return tiny_lora(targets=["q_proj", "v_proj"])


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def make(model: PeftModel, step: int = 3, value: float = 0.5) -> Checkpoint:
    state = RunState(
        step=step,
        optimizer_steps=step - 1,
        world_size=2,
        global_batch_size=8,
        engine="single",
        tokens=1234,
        scheduler={"last_epoch": step},
        summary={"loss": [1.0, 2.0]},
    )
    parameters = trainable(model)
    moments = {f"{name}.exp_avg": torch.full_like(p, value) for name, p in parameters.items()}
    per_rank = {f"{rank}/rng": torch.arange(5) + rank for rank in range(2)}
    return Checkpoint(state, parameters, moments, per_rank)


def test_round_trip(model: PeftModel, tmp_path: Path) -> None:
    saved = make(model)
    path = save_checkpoint(model, saved, tmp_path)
    assert path == tmp_path / "checkpoint-3"
    loaded = load_checkpoint(path)
    assert loaded.state == saved.state
    for ours, theirs in ((saved.moments, loaded.moments), (saved.per_rank, loaded.per_rank)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(loaded.parameters) == len(saved.parameters)
    for name, tensor in loaded.parameters.items():
        own = name.removesuffix(".weight") + ".default.weight"
        assert torch.equal(tensor, saved.parameters[own])
    assert loaded.rank(1)["rng"].tolist() == [1, 2, 3, 4, 5]
    assert loaded.rank(2) == {}


def test_what_is_saved(model: PeftModel, tmp_path: Path) -> None:
    """The adapter and the state, not the frozen base; no pickle, nothing temporary."""
    path = save_checkpoint(model, make(model), tmp_path)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        f"adapter/{ADAPTER_FILE}",
        "optimizer.safetensors",
        "ranks.safetensors",
        "state.json",
        "manifest.json",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert set(json.loads((path / "manifest.json").read_text())) == names - {"manifest.json"}
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < frozen


@pytest.mark.parametrize(
    "name", ["state.json", "optimizer.safetensors", "ranks.safetensors", f"adapter/{ADAPTER_FILE}"]
)
def test_a_damaged_file_is_named_with_both_hashes(model: PeftModel, tmp_path: Path, name: str) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    expected = json.loads((path / "manifest.json").read_text())[name]
    data = bytearray((path / name).read_bytes())
    data[-2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match=rf"{name} is damaged: SHA-256 is [0-9a-f]{{64}}, expected {expected}"):
        load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CorruptFileError, match=rf"{name} is missing"):
        load_checkpoint(path)


def test_a_missing_or_broken_manifest(model: PeftModel, tmp_path: Path) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"manifest.json cannot be read"):
        load_checkpoint(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CorruptFileError, match=r"manifest.json cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"state.json": null}'])
def test_a_manifest_that_verifies_nothing(model: PeftModel, tmp_path: Path, content: str) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    (path / "manifest.json").write_text(content)
    with pytest.raises(
        CorruptFileError, match=r"manifest.json (has no SHA-256 of adapter/.*state.json|cannot be read)"
    ):
        load_checkpoint(path)


def test_a_file_that_the_manifest_does_not_name(model: PeftModel, tmp_path: Path) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match=r"manifest.json has no SHA-256 of optimizer.safetensors"):
        load_checkpoint(path)


def test_another_format_is_refused(model: PeftModel, tmp_path: Path) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": "sparselora-checkpoint/9"}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = module.file_sha256(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="sparselora-checkpoint/9"):
        load_checkpoint(path)


# --- resume ----------------------------------------------------------------------------------------------------------


def test_resume_rules(model: PeftModel, tmp_path: Path) -> None:
    assert resolve_resume(False, tmp_path) is None
    assert resolve_resume("auto", tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"train.resume is true, but .* holds no checkpoint"):
        resolve_resume(True, tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        resolve_resume(str(tmp_path), tmp_path)
    paths = [save_checkpoint(model, make(model, step), tmp_path) for step in (9, 10)]
    (tmp_path / "checkpoint-99x").mkdir()
    assert list_checkpoints(tmp_path) == paths
    assert resolve_resume(True, tmp_path) == resolve_resume("auto", tmp_path) == paths[1]
    assert resolve_resume(str(paths[0]), tmp_path / "elsewhere") == paths[0]
    assert resolve_resume(False, tmp_path) is None


def test_save_total_limit_keeps_the_newest(model: PeftModel, tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save_checkpoint(model, make(model, step), tmp_path, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_what_was_just_saved_is_never_the_one_to_go(model: PeftModel, tmp_path: Path) -> None:
    """A new run in a folder with later checkpoints of an older one."""
    for step in (100, 200, 50):
        path = save_checkpoint(model, make(model, step), tmp_path, keep=2)
        assert path.is_dir()


# --- saving the same step again --------------------------------------------------------------------------------------


def test_save_again(model: PeftModel, tmp_path: Path) -> None:
    for value in (0.5, 0.75):
        path = save_checkpoint(model, make(model, value=value), tmp_path)
    assert next(iter(load_checkpoint(path).moments.values())).unique().tolist() == [0.75]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize("where", ["save_adapter", "save_file", "file_sha256", "publish"])
def test_a_cut_off_save_keeps_the_old_one(
    model: PeftModel, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the disk fills up, also between taking the old one away and putting the new one in its place."""
    save_checkpoint(model, make(model, value=0.5), tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, where)
        with pytest.raises(OSError, match=r"could not save .*checkpoint-3: No space left on device"):
            save_checkpoint(model, make(model, value=0.75), tmp_path)
    (path,) = list_checkpoints(tmp_path)
    assert next(iter(load_checkpoint(path).moments.values())).unique().tolist() == [0.5]
    path = save_checkpoint(model, make(model, value=0.75), tmp_path)
    assert next(iter(load_checkpoint(path).moments.values())).unique().tolist() == [0.75]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_disk_that_is_really_full_names_path_and_bytes(model: PeftModel, tmp_path: Path) -> None:
    """safetensors' error for it is no OSError; saving the same step again leaves the old one."""
    resource = pytest.importorskip("resource")
    save_checkpoint(model, make(model, value=0.5), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(model, make(model, value=0.75), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saved = make(model)
    needed = sum(t.nbytes for part in (saved.parameters, saved.moments, saved.per_rank) for t in part.values())
    message = str(error.value)
    assert f"could not save {tmp_path / 'checkpoint-3'}: File too large (it needs {needed:,} bytes, and " in message
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]  # What was half written is gone.
    assert next(iter(load_checkpoint(tmp_path / "checkpoint-3").moments.values())).unique().tolist() == [0.5]


def test_a_path_to_a_cut_off_save_resumes_from_the_old_one(model: PeftModel, tmp_path: Path) -> None:
    path = save_checkpoint(model, make(model), tmp_path)
    path.rename(tmp_path / ".checkpoint-3.old")
    assert resolve_resume(str(path), tmp_path / "elsewhere") == path
    assert load_checkpoint(path).state.step == 3


def test_several_ranks_may_put_the_old_one_back(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank renames it between this rank's look and its own renaming."""
    path = save_checkpoint(model, make(model), tmp_path)
    path.rename(tmp_path / ".checkpoint-3.old")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        rename(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert list_checkpoints(tmp_path) == [path]


def test_a_cut_off_first_save_is_no_checkpoint(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "publish")
        with pytest.raises(OSError, match="could not save"):
            save_checkpoint(model, make(model), tmp_path)
    assert list_checkpoints(tmp_path) == []
    assert resolve_resume("auto", tmp_path) is None


# --- the adapter -----------------------------------------------------------------------------------------------------


def test_adapter_round_trip(model: PeftModel, tmp_path: Path) -> None:
    save_adapter(model, trainable(model), tmp_path)
    other = tiny_lora(targets=["q_proj", "v_proj"], seed=0)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.zero_()
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(trainable(model).values(), trainable(other).values()))
    plain = PeftModel.from_pretrained(tiny_base(), str(tmp_path))
    data = {name: t for name, t in batch().items() if name != "labels"}
    assert torch.equal(plain.eval()(**data).logits, other.eval()(**data).logits)


def test_an_adapter_that_is_not_saved_whole_is_an_error(model: PeftModel, tmp_path: Path) -> None:
    hollow = {name: torch.empty(0) for name in trainable(model)}
    with pytest.raises(CorruptFileError, match="is empty"):
        save_adapter(model, hollow, tmp_path / "hollow")
    with pytest.raises(CorruptFileError, match="is empty"):
        save_adapter(model, {}, tmp_path / "nothing")


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj"], ["q_proj", "v_proj", "o_proj"]], ids=str)
def test_an_adapter_of_another_model_is_refused(model: PeftModel, tmp_path: Path, targets: list[str]) -> None:
    """Also one that has too few matrices: the others would silently start anew."""
    save_adapter(model, trainable(model), tmp_path)
    with pytest.raises(CorruptFileError, match="does not fit the model"):
        load_adapter(tiny_lora(targets=targets), tmp_path)
