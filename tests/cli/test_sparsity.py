"""``inspect --sparsity``: what a model's files say of its zeros, before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparselora_dist.cli import main
from sparselora_dist.io import zeros
from sparselora_dist.io.merge import merge_adapter
from support.merging import edit_json, save_base, tensors
from support.pruned import PATTERNS, make_marked, save_pruned


def sparsity(*words: Any) -> int:
    return main(["inspect", *map(str, words), "--sparsity"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    for pattern in (*PATTERNS, "1:4"):
        save_pruned(folder / pattern, pattern)
    make_marked(folder / "adapter", folder / "2:4")
    merge_adapter(folder / "2:4", folder / "adapter", folder / "merged")
    edit_json(folder / "adapter" / "adapter_config.json", sparse_base=None)
    merge_adapter(folder / "2:4", folder / "adapter", folder / "filled")
    return folder


def found(capsys: Any, *words: Any) -> tuple[int, Any]:
    status = sparsity(*words, "--json")
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pattern", [*PATTERNS, "1:4"])
def test_shares_and_patterns_are_those_of_the_files(
    folder: Path, pattern: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a few rows at a time."""
    monkeypatch.setattr(zeros, "_VALUES", 640)
    status, data = found(capsys, folder / pattern)
    weights = tensors(folder / pattern)
    assert status == 0 and len(data["matrices"]) == 23 and list(data["layers"]) == ["0", "1", "2"]
    for matrix in data["matrices"]:
        weight = weights[matrix["name"] + ".weight"]
        assert (matrix["zeros"], matrix["values"]) == ((weight == 0).sum(), weight.numel())
        assert matrix["pattern"] == (pattern if matrix["layer"] is not None and ":" in pattern else None)
    assert data["layers"]["1"] == pytest.approx({"0.5": 0.5, "1:4": 0.75}.get(pattern, 0.5), abs=0.02)
    assert data["lost"] is data["pruning"] is None


def test_before_and_after(folder: Path, capsys: Any) -> None:
    """A merge under the mask loses no zero; one without it does, and the status says so."""
    status, data = found(capsys, folder / "merged", "--against", folder / "2:4")
    assert status == 0 and data["lost"] == 0 and all(matrix["lost"] == 0 for matrix in data["matrices"])
    assert sparsity(folder / "filled", "--against", folder / "2:4") == 1
    captured = capsys.readouterr()
    assert "positions are zero in" in captured.err and "merged without its mask" in captured.err
    lost = int(captured.err.split()[1])
    before, after = tensors(folder / "2:4"), tensors(folder / "filled")
    assert lost == sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in before) > 50_000


def test_4_bits_are_read_from_codes(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    make_marked(tmp_path / "adapter", folder / "2:4")
    merge_adapter(folder / "2:4", tmp_path / "adapter", tmp_path / "nf4", save_in_4bit=True)
    status, data = found(capsys, tmp_path / "nf4", "--against", folder / "2:4")
    assert status == 0 and data["lost"] == 0 and len(data["matrices"]) == 23
    inside = [matrix for matrix in data["matrices"] if matrix["layer"] is not None]
    assert {matrix["pattern"] for matrix in inside} == {"2:4"}
    assert all(0.5 <= matrix["sparsity"] < 0.6 for matrix in inside) and sum(m["gained"] for m in inside) > 0
    # The other way round the weights that 4 bits made zero are there again.
    assert sparsity(folder / "merged", "--against", tmp_path / "nf4") == 1
    capsys.readouterr()


def test_the_table_and_the_record(folder: Path, tmp_path: Path, capsys: Any) -> None:
    base = save_pruned(tmp_path / "base", "0.5")
    record = {
        "asked": {"model": "org/m", "method": "wanda", "pattern": "0.5", "data": "rows.jsonl", "tokens": "ab" * 16},
        "layers": {str(layer): {"self_attn.q_proj": 0.5, "mlp.down_proj": 0.5} for layer in range(3)},
    }
    (base / "pruning.json").write_text(json.dumps(record))
    assert sparsity(base) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["layer", "all", "pattern", "q", "k", "v", "o", "gate", "up", "down"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"] and lines[5].startswith("mean")
    assert max(map(len, lines[1:])) <= 116 and "lm_head 0.00" in lines[6]
    assert " ".join(lines[7:]) == (
        f"pruning.json: wanda 0.5 of org/m, calibrated on rows.jsonl (tokens' SHA-256 {'ab' * 8}); all 6 matrices have the "
        "zeros that it records"
    )
    record["layers"]["1"]["mlp.down_proj"] = 0.9
    (base / "pruning.json").write_text(json.dumps(record))
    assert sparsity(base) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fewer zeros than it records in 1 of 6 matrices, first model.layers.1.mlp.down_proj: 5" in said
    _, data = found(capsys, base)
    assert data["pruning"] == record["asked"]
    assert {m["name"]: m["recorded"] for m in data["matrices"]}["model.layers.1.mlp.down_proj"] == 0.9


def test_bad_input_is_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    small = save_base(tmp_path / "small", dtype=torch.bfloat16)
    (tmp_path / "int8").mkdir()
    save_file({"x.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "int8" / "model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({"x.weight": torch.zeros(4, 4)}, tmp_path / "other" / "model.safetensors")
    cases: dict[str, tuple[Any, ...]] = {
        "is not a folder with a model": (tmp_path / "none",),
        "holds neither model.safetensors nor": (tmp_path,),
        "'x.weight' is stored as I8": (tmp_path / "int8",),
        "has shape": (folder / "2:4", "--against", small),
        "has no 'lm_head.weight', which": (tmp_path / "other", "--against", folder / "2:4"),
        "'--config' has no meaning with --sparsity": (folder / "2:4", "--config", "run.json"),
    }
    capsys.readouterr()
    for message, words in cases.items():
        assert sparsity(*words) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and message in captured.err and not captured.out, message
    assert main(["inspect", str(folder), "--against", str(folder)]) == 2
    assert "give --sparsity too" in capsys.readouterr().err
