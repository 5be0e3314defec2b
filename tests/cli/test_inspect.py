"""The command: its table, its files, its JSON and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from support.harness import ROOT

MODEL = ROOT / "demo/model"
EVAL = ROOT / "demo/data/eval.jsonl"


def config(folder: Path, **sections: Any) -> Path:
    """A run file for the embedded model, 2 sparse layers."""
    data: dict[str, Any] = {
        "model": {"name_or_path": "org/elsewhere", "dtype": "float32"},
        "sparse_lora": {"rank": 4, "layers": {"ffn": {"2-3": 0.9}, "vo": {"3": 0.5}}},
        "data": {"train": str(EVAL), "max_length": 192},
        "train": {"output_dir": str(folder / "out"), "per_device_train_batch_size": 4},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(data | sections))
    return path


def inspect(*words: Any) -> int:
    return main(["inspect", *map(str, words)])


def test_a_model_with_a_run_file(tmp_path: Path, capsys: Any) -> None:
    """The table fits 110 columns; the run's own rank is compared too; nothing is written without --output."""
    path = config(tmp_path)
    assert inspect(MODEL, "--config", path, "--rows", 12) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110 and lines[0].startswith("12 rows of eval.jsonl, 3 batches of 4, ")
    head = next(line for line in lines if line.startswith("group"))
    choices = "random r4 r8 r32"
    assert " ".join(head.split()) == f"group layer kept {choices} {choices} exact batches ranks"
    assert [line.split()[:2] for line in lines if line[:3] in ("ffn", "vo ")] == [
        ["ffn", "2"], ["ffn", "3"], ["ffn", "mean"], ["vo", "3"], ["vo", "mean"],
    ]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json"]


def test_json_and_files(tmp_path: Path, capsys: Any) -> None:
    path, output = config(tmp_path), tmp_path / "deep" / "report"
    words = (MODEL, "--config", path, "--data", EVAL, "--rows", 8, "--ranks", "2,16", "--output", output, "--json")
    assert inspect(*words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((output / "fidelity.json").read_text())
    assert printed["ranks"] == [2, 4, 16] and printed["own_rank"] == 4 and printed["adapter"] is None
    assert list(printed["groups"]) == ["ffn", "vo"]
    for site in printed["sites"]:
        assert list(site["recall"]) == list(site["energy"]) == ["random", "2", "4", "16", "exact"]
        assert site["between_steps"] and site["between_ranks"] and site["adapted_recall"] is None
    assert "This is no run" in (output / "report.html").read_text()
    # The same again gives the same figures.
    assert inspect(*words) == 0 and json.loads(capsys.readouterr().out) == printed


def test_a_run_without_its_adapter(tmp_path: Path, capsys: Any) -> None:
    """An unfinished run: the base model is measured, and the report says what is missing."""
    run = tmp_path / "run"
    run.mkdir()
    data = json.loads(config(tmp_path).read_text())
    (run / "run.json").write_text(json.dumps(data | {"model": {"name_or_path": str(MODEL), "dtype": "float32"}}))
    assert inspect(run, "--rows", 4) == 0
    out = capsys.readouterr().out
    assert "no adapter" in out and out.splitlines()[-1] == f"report: {run / 'inspect' / 'report.html'}"
    assert "summary.json is not there" in (run / "inspect" / "report.html").read_text()


def test_bad_input_is_named(tmp_path: Path, capsys: Any) -> None:
    path = config(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "All of this is trained on."}\n' * 4)
    (tmp_path / "file").write_text("")
    cases: dict[str, tuple[Any, ...]] = {
        "is not a run (a folder without run.json): give the output_dir": (tmp_path,),
        "is not a run (no folder)": (tmp_path / "nowhere",),
        "'--ranks' holds 0: allowed: integers from 1": (MODEL, "--config", path, "--ranks", "8,0"),
        "'--ranks' is '8;32': allowed: integers from 1 with commas": (MODEL, "--config", path, "--ranks", "8;32"),
        "'--rows' is 0": (MODEL, "--config", path, "--rows", 0),
        "nothing.jsonl does not exist (set by --data": (MODEL, "--config", path, "--data", tmp_path / "nothing.jsonl"),
        "has no context tokens in its first 4 row(s)": (MODEL, "--config", path, "--data", tmp_path / "text.jsonl"),
        "which is a file: allowed: a folder": (MODEL, "--config", path, "--output", tmp_path / "file"),
    }
    for message, words in cases.items():
        assert inspect(*words) == 2, words
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and message in err and not out, (message, err)


@pytest.mark.parametrize("layers", [{}, {"ffn": {}}])
def test_nothing_sparse(tmp_path: Path, capsys: Any, layers: dict[str, Any]) -> None:
    path = config(tmp_path, sparse_lora={"enabled": False, "layers": layers})
    assert inspect(MODEL, "--config", path) == 2
    assert "'sparse_lora.layers' is empty: there is no sparse layer to inspect" in capsys.readouterr().err
