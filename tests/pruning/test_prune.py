"""Pruning whole models: the demo model and data, by every method, on one rank and several."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparselora_dist.cli import main
from sparselora_dist.io.pretrained import read_config, read_tokenizer
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layerwise.calibration import read_sequences
from sparselora_dist.layerwise.growing import GrowingModel
from sparselora_dist.layerwise.layer_stream import LayerStream
from sparselora_dist.layerwise.statistics import deal, parts_of
from sparselora_dist.pruning.criteria import METHODS
from sparselora_dist.pruning.pattern import Pattern
from sparselora_dist.pruning.prune import Pruning, prune
from support.every_type import tiny_model
from support.harness import ROOT, run_ranks
from support.pruning_workers import asked_of

MODEL, DATA = ROOT / "demo" / "model", ROOT / "demo" / "data" / "train.jsonl"
CASES = [(method, pattern) for method in METHODS for pattern in ("0.5", "2:4")]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one rank, in folders of their own; a process as those of several ranks are, with one thread."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks("support.pruning_workers:pruned_files", 1, str(folder), CASES)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def matrices(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if ".layers." in name and value.dim() == 2}


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_zeros_are_as_asked(method: str, pattern: str, one: Path) -> None:
    before, after = tensors(MODEL), tensors(one / f"{method}-{pattern}")
    assert before.keys() == after.keys()
    for name, value in after.items():
        if name not in matrices(after):
            assert torch.equal(value, before[name]), name
        elif pattern == "2:4":
            assert ((value.view(-1, 4) == 0).sum(1) == 2).all(), name
        else:
            assert abs((value == 0).double().mean() - 0.5) < 1e-3, name


def calibration_tokens() -> Tensor:
    asked = asked_of("wanda", "0.5", Path("unused"))
    assert asked.data and asked.length
    return read_sequences(asked.data, read_tokenizer(str(MODEL)), asked.sequences, asked.length).sequences


def test_the_statistics_are_of_the_pruned_model_s_inputs(one: Path) -> None:
    """The last layer's Wanda zeros, from a plain forward of the model whose earlier layers are pruned."""
    model = AutoModelForCausalLM.from_pretrained(one / "wanda-0.5").eval()
    last = model.model.layers[-1]
    dense = AutoModelForCausalLM.from_pretrained(MODEL).model.layers[-1]
    kept = {name: p.clone() for name, p in last.state_dict().items()}
    last.load_state_dict(dense.state_dict())
    seen: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, module in last.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: seen[name] + args[0][0].float().square().sum(0)})
            )
    with torch.no_grad():
        for row in calibration_tokens():
            model(input_ids=row[None])
    for name, squares in seen.items():
        found = METHODS["wanda"].prune(
            dense.get_submodule(name).weight.detach().float(), squares, 1, Pattern.share(0.5)
        )
        assert ((found == 0) == (kept[f"{name}.weight"] == 0)).double().mean() > 0.9999, name


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_bytes(ranks: int, one: Path, tmp_path: Path) -> None:
    cases = CASES if ranks == 2 else [("wanda", "0.5"), ("sparsegpt", "2:4")]
    run_ranks("support.pruning_workers:pruned_files", ranks, str(tmp_path), cases)
    for method, pattern in cases:
        expected, found = tensors(one / f"{method}-{pattern}"), tensors(tmp_path / f"{method}-{pattern}")
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), (method, pattern)


class StopError(Exception):
    pass


@contextmanager
def stopped_after(layers: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    add = GrowingModel.add

    def counted(self: GrowingModel, number: int, *args: Any) -> None:
        add(self, number, *args)
        if number == layers - 1:
            raise StopError

    with patch.context() as inner:
        inner.setattr(GrowingModel, "add", counted)
        yield


def test_it_goes_on_after_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = (asked_of("sparsegpt", "2:4", tmp_path / name) for name in ("stopped", "whole"))
    prune(whole)
    with stopped_after(2, monkeypatch), pytest.raises(StopError):
        prune(asked)
    partial = asked.output.with_name(f"{asked.output.name}.partial")
    assert partial.is_dir() and not asked.output.exists()
    other = asked_of("sparsegpt", "0.5", tmp_path)
    with pytest.raises(ValueError, match=r"was begun with pattern '2:4', not '0.5'"):
        prune(Pruning(**{name: getattr(other, name) for name in other.__slots__} | {"output": asked.output}))
    written = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(written) == 2
    record = prune(asked)
    assert not partial.exists() and len(record["layers"]) == len(list(asked.output.glob("*.safetensors"))) - 1
    assert all((asked.output / name).stat().st_mtime_ns == when for name, when in written.items())
    expected, found = tensors(whole.output), tensors(asked.output)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(FileExistsError, match="exists already"):
        prune(asked)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = ["prune", "--model", str(MODEL), "--method", "magnitude", "--pattern", "4:8", "--output", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{output}: magnitude 4:8" in said and "zeros 50.00% to 50.00%" in said
    record = json.loads((output / "pruning.json").read_text())
    assert record["asked"]["method"] == "magnitude" and set(record["layers"]["0"].values()) == {0.5}
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "wanda", "--sparsity", "0.5"], "--method wanda looks at activations: give --data"),
        (["--method", "obc", "--sparsity", "0.5"], "--method is 'obc': allowed: magnitude, wanda, ria, sparsegpt"),
        (["--method", "magnitude", "--sparsity", "50"], "sparsity is 50.0: allowed: numbers between 0 and 1"),
        (["--method", "magnitude", "--pattern", "3:7"], "the rows of model.layers.0.self_attn.q_proj have"),
        (
            ["--sparsity", "0.5", "--data", str(DATA), "--sequences", "1000000", "--length", "64"],
            "sequences of 64 need 64000000: give more data, --sequences",
        ),
        (["--sparsity", "0.5", "--data", str(DATA), "--length", "100000"], "the model was made for"),
        (["--sparsity", "0.5", "--data", str(DATA), "--sequences", "0"], "--sequences 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["prune", "--model", str(MODEL), *words, "--output", str(output)]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_parts_do_not_depend_on_the_ranks() -> None:
    for sequences in (1, 5, 8, 128):
        whole = parts_of(sequences, 0, 1)
        assert [n for part in whole for n in part] == list(range(sequences))
        for ranks in range(1, len(whole) + 1):
            assert [part for rank in range(ranks) for part in parts_of(sequences, rank, ranks)] == whole
            assert all(parts_of(sequences, rank, ranks) for rank in range(ranks))


def test_matrices_are_dealt_by_cost() -> None:
    shapes = {
        "q": torch.Size((8, 8)),
        "down": torch.Size((8, 32)),
        "up": torch.Size((32, 8)),
        "gate": torch.Size((32, 8)),
    }
    assert deal(shapes, 2) == {"down": 0, "up": 1, "gate": 1, "q": 1}


OTHERS = [("gpt2", r"has attn\.c_attn\.weight, which"), ("qwen3_moe", r"has mlp\.experts\.gate_up_proj, which")]


@pytest.mark.parametrize(("family", "told"), OTHERS)
def test_layers_of_more_than_linears_are_refused(family: str, told: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    asked = Pruning(
        model=str(tmp_path / "model"), method="magnitude", pattern=Pattern.share(0.5), output=tmp_path / "out"
    )
    with pytest.raises(ValueError, match=told):
        prune(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_layers_that_are_given_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    """Gemma 4 hands every layer an input of its own, made of the tokens."""
    tiny_model("gemma4_text").save_pretrained(tmp_path)
    files = TensorFiles.of_model(tmp_path)
    stream = LayerStream(read_config(str(tmp_path)), files, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="gives its layers more that depends on the tokens"):
        stream.embed(torch.arange(3, 11)[None])
