"""``sparselora-dist merge`` as a user calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from support.merging import make_adapter, save_base, tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    base = save_base(folder / "base", shard="40KB")
    make_adapter(folder / "adapter", base)
    return ["--base", str(base), "--adapter", str(folder / "adapter")]


def test_merges_and_says_what_it_wrote(folders: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["merge", *folders, "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    last = captured.out.strip().splitlines()[-1]
    assert last.startswith(f"wrote {tmp_path / 'out'}: ") and last.endswith("in float32; merged 21 matrices")
    assert "merging" not in captured.err, "a progress bar where no terminal is"
    assert tensors(tmp_path / "out")


def test_4bit(folders: list[str], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    command = ["merge", *folders, "--output"]
    assert main([*command, str(tmp_path / "a"), "--load-in-4bit"]) == 0
    assert capsys.readouterr().out.strip().endswith("merged 21 matrices, dequantised 21 matrices")
    assert main([*command, str(tmp_path / "b"), "--load-in-4bit", "--no-double-quant"]) == 0
    name = "model.layers.0.mlp.up_proj.weight"
    assert not tensors(tmp_path / "a")[name].equal(tensors(tmp_path / "b")[name])


def test_bad_input_is_status_2(folders: list[str], tmp_path: Path, capsys: Any) -> None:
    out = ["--output", str(tmp_path / "out")]
    for words, message in (
        ([*folders, "--output", str(tmp_path)], "exists already"),
        ([*folders, *out, "--no-double-quant"], "give --load-in-4bit too"),
        ([*folders[:2], "--adapter", str(tmp_path / "none"), *out], "is not a folder"),
        (["--base", "org/name", *folders[2:], *out], "--base org/name is not a folder; download the model first"),
    ):
        assert main(["merge", *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and message in captured.err and not captured.out
    assert not (tmp_path / "out").exists()


def test_help_says_what_4bit_means(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "bitsandbytes has quantised (nf4)" in words and "o_proj and down_proj" in words
