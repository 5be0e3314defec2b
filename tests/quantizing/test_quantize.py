"""Quantising whole models: a small one with the demo's tokens, on one rank and several, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparselora_dist.cli import main
from sparselora_dist.codecs import FrozenLinear, codec_named
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import LoadedBase, load_base
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import TRANSPOSED
from sparselora_dist.quantizing.quantize import Quantizing, quantize
from sparselora_dist.sharding.placement import Placement
from sparselora_kernels.reference import level_rows
from support.harness import run_ranks
from support.merging import make_adapter
from support.models import ALL_LINEAR, tiny_base
from support.quantizing_workers import CASES, DATA, STARTED, STOPPED, asked_of, model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one rank, in folders of their own, and one that was stopped; a process as those of several ranks are,
    with one thread."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks("support.quantizing_workers:quantized_files", 1, str(model), str(folder), list(CASES), True)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization.json").read_text())


def load(folder: Path, format: str, bits: int | None = None) -> LoadedBase:
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    quantization = QuantizationSection(format=format, bits=bits)  # type: ignore[arg-type]
    return load_base(section, quantization, Placement(torch.device("cpu")))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_everything_else_is_as_it_was(case: str, one: Path, model: Path) -> None:
    before, after = tensors(model), tensors(one / case)
    matrices = {name for name in before if name.split(".")[-2] in ALL_LINEAR}
    assert len(matrices) == 2 * 7
    for name, value in before.items():
        if name in matrices:
            assert after[name].dtype == torch.uint8
        else:
            assert torch.equal(after[name], value), name
    config = json.loads((one / case / "config.json").read_text())
    asked = record(one / case)["asked"]
    assert config.pop("quantization_config") == {
        "quant_method": "sparselora", "format": asked["format"], "bits": asked["bits"], "version": 1
    }  # fmt: skip
    assert {
        key: value for key, value in json.loads((model / "config.json").read_text()).items() if key in config
    } == config
    assert (one / case / "tokenizer.json").is_file()


def test_billm_takes_its_two_bits_and_seven_numbers(tmp_path: Path) -> None:
    """2 bits of code and 7 · 16 / 128 of numbers a weight, and the columns; nothing that is claimed beside them."""
    codec = codec_named("billm", 2)
    parts = {name: part.bytes(4096) * 8 / (4096 * 14336) for name, part in codec.parts(14336).items()}
    assert parts["codes"] + parts["params"] == 2.875 and parts["columns"] == 1 / 4096


def test_the_record(one: Path) -> None:
    found = record(one / "billm")
    assert found["asked"] | {"model": "", "data": "", "tokens": ""} == {
        "model": "", "format": "billm", "bits": 2, "compensate": "exact", "dtype": "float32", "data": "", "tokens": "",
        "sequences": 6, "length": 48,
    }  # fmt: skip
    assert len(found["asked"]["tokens"]) == 32 and found["version"]
    errors = [error for layer in found["layers"].values() for error in layer.values()]
    assert len(errors) == 2 * 7 and all(0 < error < 0.5 for error in errors) and found["error"] == "of the outputs"
    assert record(one / "shiftadd")["error"] == "of the weights"
    assert record(one / "fp8")["bits_per_weight"] == pytest.approx(8.17, abs=0.02)


# --- on any number of ranks, stopped and gone on with -------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_bytes(ranks: int, one: Path, model: Path, tmp_path: Path) -> None:
    """Two go on with what one has begun, too."""
    cases = [*CASES, STOPPED] if ranks == 2 else ["billm"]
    begun = tmp_path / f"{STOPPED}.partial"
    if ranks == 2:
        shutil.copytree(one / begun.name, begun)
        assert list(record(begun)["layers"]) == ["0"]
    run_ranks("support.quantizing_workers:quantized_files", ranks, str(model), str(tmp_path), cases, False)
    for case in cases:
        expected, found = tensors(one / (STARTED if case == STOPPED else case)), tensors(tmp_path / case)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), case
        assert record(tmp_path / case)["layers"] == record(one / (STARTED if case == STOPPED else case))["layers"]
    assert not begun.exists()


def test_another_request_does_not_go_on(one: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(one / f"{STOPPED}.partial", tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"was begun with compensate 'exact', not 'none'"):
        quantize(replace(asked_of("billm", model, tmp_path / "out"), compensate="none"))
    with pytest.raises(FileExistsError, match="exists already"):
        quantize(asked_of("billm", model, one / "billm"))


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_the_bytes_as_they_are(case: str, one: Path) -> None:
    asked, files = record(one / case)["asked"], tensors(one / case)
    loaded = load(one / case, asked["format"])
    for layer in decoder_layers(loaded.model):
        for name in layer.names:
            linear, key = layer.matrix(name), f"{layer.path_of(name)}.weight"
            assert isinstance(linear, FrozenLinear)
            others = linear.part_names[1:]
            assert torch.equal(linear.parts[0], files[key])
            assert all(torch.equal(getattr(linear, part), files[f"{key}.{part}"]) for part in others)
            # The estimator's factors are made of what is computed with.
            seen = linear.matrix(linear.parts, torch.float32)
            assert torch.equal(loaded.weights.get(layer.index, name), seen)
            assert loaded.weights.mark(layer.index, name) != loaded.weights.mark(1 - min(layer.index, 1), name)
    assert loaded.model(input_ids=torch.arange(3, 19)[None]).logits.isfinite().all()


def test_values_by_the_reference(one: Path) -> None:
    files, loaded = tensors(one / "billm"), load(one / "billm", "billm")
    for name in ("k_proj", "down_proj"):
        linear: Any = decoder_layers(loaded.model)[1].matrix(name)
        key = next(
            key for key in files if f"layers.1.{'mlp' if name in TRANSPOSED else 'self_attn'}.{name}.weight" in key
        )
        rows = torch.tensor([0, 31])
        length = linear.row_length
        expected = level_rows(
            files[key],
            files[f"{key}.params"],
            files[f"{key}.columns"],
            rows,
            torch.float32,
            length=length,
            rule=2,
            bits=2,
        )
        matrix = linear.matrix(linear.parts, torch.float32)
        assert torch.equal((matrix.t() if name in TRANSPOSED else matrix)[rows], expected)


def test_without_data_it_is_what_a_run_makes_itself(one: Path, model: Path) -> None:
    found, made = (load(folder, "shiftadd").model for folder in (one / "shiftadd", model))
    expected = dict(made.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())


def test_merging_adds_to_what_is_stored(one: Path, model: Path, tmp_path: Path) -> None:
    """The same as with a plain model of the values that the codes decode to."""
    loaded, dense = load(one / "billm", "billm"), AutoModelForCausalLM.from_pretrained(model)
    for layer, plain in zip(decoder_layers(loaded.model), decoder_layers(dense)):
        for name in layer.names:
            linear: Any = layer.matrix(name)
            plain.matrix(name).weight.data.copy_(linear.matrix(linear.parts, torch.float32))  # type: ignore[union-attr]
    dense.save_pretrained(tmp_path / "dense")
    make_adapter(tmp_path / "adapter", model)
    for base in (one / "billm", tmp_path / "dense"):
        summary = merge_adapter(base, tmp_path / "adapter", tmp_path / f"merged-{base.name}", dtype="float32")
        assert summary.dequantized == (2 * 7 if base.name == "billm" else 0)
    found, expected = tensors(tmp_path / "merged-billm"), tensors(tmp_path / "merged-dense")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "merged-billm" / "config.json").read_text())
    with pytest.raises(ValueError, match=r'is stored as billm: set quantization.format "billm"'):
        merge_adapter(one / "billm", tmp_path / "adapter", tmp_path / "no", load_in_4bit=True)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(one: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return shutil.copytree(one / "hqq 3", tmp_path / "copy")


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of the second layer's file, and the index with them."""
    file = sorted(folder.glob("*.safetensors"))[1]
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name} | dict.fromkeys(
        held, file.name
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def state(held: dict[str, Tensor], **values: Any) -> None:
    name = f"{KEY}.stored"
    held[name] = torch.tensor(
        list(json.dumps(json.loads(bytes(held[name].tolist())) | values).encode()), dtype=torch.uint8
    )


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.pop(f"{KEY}.params"), rf"{KEY}.params of .* is missing, but params of a hqq matrix"),
        (lambda held: held.update({KEY: held[KEY][:-1].clone()}), rf"{KEY} of .* is U8 \(319, 96\), but codes of a hqq"),
        (lambda held: state(held, shape=[320, 448]), rf"{KEY} of .* is U8 .*, but codes of a hqq matrix of shape"),
        (lambda held: state(held, version=2), rf"{KEY}.stored of .* has version 2: only 1 is read"),
        (lambda held: state(held, bits=5), rf"{KEY}.stored of .* does not describe a matrix"),
        (lambda held: state(held, transposed=True, shape=[192, 320]), "but config.json asks for"),
        (lambda held: held.update({f"{KEY}.stored": torch.zeros(4, dtype=torch.uint8)}), "does not describe a matrix"),
    ],
)  # fmt: skip
def test_a_damaged_matrix_is_named(change: Any, told: str, copy: Path) -> None:
    rewrite(copy, change)
    with pytest.raises(ValueError, match=told):
        load(copy, "hqq")


def test_what_the_run_says_must_agree(one: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match=r'is stored as hqq: set quantization.format "hqq"'):
        load(one / "hqq 3", "bcq")
    with pytest.raises(ValueError, match=r"has codes of 3 bits: set quantization.bits 3, or leave it out"):
        load(one / "hqq 3", "hqq", 4)
    with pytest.raises(ValueError, match=r'is stored as billm: set quantization.format "billm"'):
        load_base(
            ModelSection(name_or_path=str(one / "billm"), dtype="float32"),
            QuantizationSection(),
            Placement(torch.device("cpu")),
        )
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = 7
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json\) has version 7: only 1 is read"):
        load(copy, "hqq")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "billm"], "--format billm looks at activations: give --data"),
        (["--format", "bcq", "--compensate", "exact"], "--compensate exact looks at activations: give --data"),
        (["--format", "nf4"], "--format is 'nf4': allowed: fp8, hqq, bcq, shiftadd, billm"),
        (["--format", "fp8", "--bits", "4"], "'quantization.bits' is 4, but fp8 has 8"),
        (["--format", "fp8", "--data", str(DATA), "--compensate", "all"], "--compensate is 'all': allowed: exact,"),
        (["--format", "fp8", "--data", str(DATA), "--sequences", "0"], "--sequences 0"),
        (["--format", "fp8", "--data", str(DATA), "--length", "100000"], "the model was made for"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    words: list[str], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", str(model), *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_the_command_and_what_it_does_not_take(
    one: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert main(["quantize", "--model", str(model), "--format", "bcq", "--bits", "2", "--output", output]) == 0
    said = capsys.readouterr().out
    assert f"{output}: bcq, 2 bits a code" in said and '"quantization": {"format": "bcq"}' in said
    assert main(["quantize", "--model", str(one / "billm"), "--format", "bcq", "--output", f"{output}-again"]) == 2
    assert "is quantised: give the model that it was made from" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "qwen2"])
def test_other_layouts(family: str, tmp_path: Path) -> None:
    """Several matrices in one, biases, no gate: what a run with the same format stores."""
    tiny_base(family, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    quantize(Quantizing(model=str(tmp_path / "model"), format="fp8", output=tmp_path / "fp8"))
    found, made = (dict(load(tmp_path / name, "fp8").model.named_parameters()) for name in ("fp8", "model"))
    assert found.keys() == made.keys() and any("scales" in name for name in found)
    assert all(torch.equal(p, made[name]) for name, p in found.items())
