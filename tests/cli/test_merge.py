"""``sparselora-dist merge`` as a user calls it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sparselora_dist.cli import main
from sparselora_dist.config import ModelSection, QuantizationSection, RunConfig
from sparselora_dist.io.load import load_base
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.sharding.placement import Placement
from sparselora_dist.train.closing import closing_words
from support.compare import assert_close
from support.merging import load, make_adapter, save_base, tensors


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


def test_the_command_that_a_run_prints_merges_into_what_it_trained_on(
    folders: list[str], tmp_path: Path, capsys: Any
) -> None:
    summary = dict.fromkeys(("train_loss_first", "train_loss_last", "executed_flops_share"), 1.0)
    summary |= {"eval_loss": None, "tokens_per_second": None, "adapter": folders[3]}
    results = []
    for number, said in enumerate(
        ({"format": "bcq", "bits": 2}, {"format": "bcq"}, {"format": "fp8"}, {"load_in_4bit": True})
    ):
        config: Any = {"model": {"name_or_path": folders[1], "dtype": "float32"}, "data": {"train": "rows.jsonl"}}
        config |= {"train": {"output_dir": str(tmp_path / str(number))}, "quantization": said}
        words = shlex.split(closing_words(RunConfig.from_dict(config), summary).rsplit("sparselora-dist", 1)[1])
        assert main(words) == 0
        assert capsys.readouterr().out.strip().endswith("merged 21 matrices, dequantised 21 matrices")
        section = QuantizationSection(**said)
        model = load_base(
            ModelSection(name_or_path=folders[1], dtype="float32"), section, Placement(torch.device("cpu"))
        ).model
        merged = tensors(tmp_path / str(number) / "merged")
        bare = dict(PeftModel.from_pretrained(load(Path(folders[1])), folders[3]).named_modules())
        for layer in decoder_layers(model):
            for name in layer.names:
                path, linear = layer.path_of(name), layer.matrix(name)
                stored, adapter = linear.matrix(linear.parts, torch.float32), bare[f"base_model.model.{path}"]
                expected = stored + adapter.get_delta_weight("default")
                assert_close(path, expected, merged[f"{path}.weight"], rtol=1e-5, atol=1e-6)
        results.append(merged["model.layers.0.mlp.up_proj.weight"])
    assert not any(one.equal(other) for i, one in enumerate(results) for other in results[:i])


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
