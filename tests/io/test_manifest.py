"""Publishing is all or nothing; hashes see every change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparselora_dist.io.manifest import (
    CorruptFileError,
    file_sha256,
    publish,
    read_safetensors,
    tensors_sha256,
    write_text,
)


def test_publish_replaces_a_file(tmp_path: Path) -> None:
    final, temporary = tmp_path / "a.txt", tmp_path / ".a.tmp"
    final.write_text("old")
    temporary.write_text("new")
    publish(temporary, final)
    assert final.read_text() == "new" and not temporary.exists()


def test_publish_moves_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".tmp" / "inner").mkdir(parents=True)
    (tmp_path / ".tmp" / "inner" / "x").write_text("1")
    publish(tmp_path / ".tmp", tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "inner" / "x").read_text() == "1"


def test_a_cut_off_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_what_is_published_is_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents are synchronised before the name appears, the folder after."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("sync"), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "a", "x")
    assert order == ["sync", "replace", "sync"]


def test_tensor_hash_sees_names_dtypes_shapes_and_values() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    variants = [
        tensors,
        {"a": tensors["b"], "b": tensors["a"]},
        {"a": tensors["a"]},
        {**tensors, "a": torch.zeros(3, 2)},
        {**tensors, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**tensors, "b": torch.tensor([1, 1, 1, 1 + 1e-7])},
    ]
    assert len({tensors_sha256(t) for t in variants}) == len(variants)
    assert tensors_sha256({"b": tensors["b"].clone(), "a": tensors["a"].clone()}) == tensors_sha256(tensors)
    assert tensors_sha256({"a": torch.zeros(3, 2).t()}) == tensors_sha256({"a": torch.zeros(2, 3)})


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_reading_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=str(file)):
        read_safetensors(file)
    save_file({"a": torch.arange(3)}, file, {"k": "v"})
    tensors, metadata = read_safetensors(file)
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"k": "v"}
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=str(file)):
        read_safetensors(file)
