"""``quantize --loftq``: an adapter beside the codes, where a run over that folder, and no other, starts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparselora_dist.apply.build import build_model
from sparselora_dist.apply.loftq import loftq_start
from sparselora_dist.cli import main
from sparselora_dist.config import ConfigError, LoraSection
from sparselora_dist.config.run import RunConfig
from sparselora_dist.io.load import load_base
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.start_adapter import completed, read_start
from sparselora_dist.layerwise.model_files import ModelFiles
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.quantizing.quantize import Quantizing, _Layers, quantize
from sparselora_dist.quantizing.start import GrowingAdapter
from sparselora_dist.sharding.placement import Placement
from support.merging import edit_json, load
from support.quantizing_workers import DATA, LOFTQ, STARTED, asked_of, begin, model_folder

CPU, IDS = torch.device("cpu"), torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def billm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "billm"
    quantize(asked_of(STARTED, model, output))
    return output


def run_over(folder: Path, stored: dict[str, Any], model: dict[str, Any] | None = None, **lora: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(folder), "dtype": "float32"} | (model or {}),
            "quantization": stored,
            "lora": LOFTQ | lora,
            "sparse_lora": {"enabled": False},
            "data": {"train": str(DATA)},
            "train": {"output_dir": "none", "max_steps": 1},
        }
    )


def logits(config: RunConfig, ids: torch.Tensor = IDS) -> torch.Tensor:
    config = completed(config)
    made: Any = build_model(config, Placement(CPU), start=read_start(config))[0].eval()
    with torch.no_grad():
        return made(input_ids=ids).logits


def test_a_run_starts_nearer_to_the_model_than_the_codes_are(billm: Path, model: Path) -> None:
    """On what it was calibrated with."""
    ids = ModelFiles.open(str(model), CPU).sequences(str(DATA), 6, 48).sequences
    with torch.no_grad():
        expected = load(model)(input_ids=ids).logits
    started = run_over(billm, {"format": "billm"})
    plain = replace(started, lora=LoraSection.from_dict({"r": 4}))
    far, near = ((logits(config, ids) - expected).norm() for config in (plain, started))
    assert near < 0.98 * far


def test_it_is_an_adapter_that_peft_reads_and_a_merge_adds(billm: Path, tmp_path: Path) -> None:
    merge_adapter(billm, billm / "loftq_init", tmp_path / "merged", dtype="float32")
    config = completed(run_over(billm, {"format": "billm"}))
    base = load_base(config.model, config.quantization, Placement(CPU)).model
    with torch.no_grad():
        merged = load(tmp_path / "merged")(input_ids=IDS).logits
        seen = PeftModel.from_pretrained(base, billm / "loftq_init").eval()(input_ids=IDS).logits
    assert torch.allclose(merged, logits(run_over(billm, {"format": "billm"})), atol=1e-4)
    assert torch.allclose(merged, seen, atol=1e-4)
    said = json.loads((billm / "loftq_init" / "adapter_config.json").read_text())
    assert (said["loftq_rounds"], said["init_lora_weights"], said["base_model_name_or_path"]) == (2, True, str(billm))
    record = json.loads((billm / "quantization.json").read_text())
    assert (
        record["asked"]["loftq"] == LOFTQ | {"task_type": "CAUSAL_LM"}
        and record["error"] == "of the outputs, under the adapter"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_data_it_is_what_a_run_makes_itself(dtype: str, model: Path, tmp_path: Path) -> None:
    """Codes and factors, to the bit: also of what is computed with in bf16."""
    stored, section = {"format": "hqq", "bits": 3}, {"dtype": dtype}
    if dtype == "bfloat16":
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
        model = tmp_path / "bf16"
    start = loftq_start(run_over(model, stored, section), Placement(CPU), None)
    assert start and start.shift
    asked = Quantizing(model=str(model), output=tmp_path / "hqq", loftq=LoraSection.from_dict(LOFTQ), **stored)  # type: ignore[misc]
    quantize(asked)
    adapter = load_file(tmp_path / "hqq" / "loftq_init" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(start.pairs) == 2 * 2 * 4
    for module, pair in start.pairs.items():
        assert all(torch.equal(adapter[f"base_model.model.{module}.lora_{s}.weight"], v) for s, v in zip("AB", pair))
    config = completed(run_over(tmp_path / "hqq", stored, section))
    found = load_base(config.model, config.quantization, Placement(CPU))
    made = load_base(run_over(model, stored, section).model, config.quantization, Placement(CPU), shift=start.shift)
    for own, other in zip(decoder_layers(found.model), decoder_layers(made.model)):
        for name in own.names:
            parts = (one.matrix(name).parts for one in (own, other))  # type: ignore[union-attr]
            assert all(torch.equal(*pair) for pair in zip(*parts)), name


def test_later_layers_are_calibrated_on_codes_and_starts_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, torch.Tensor] = {}
    inputs = _Layers._inputs

    def recorded(self: _Layers, layer: Any, linears: Any) -> Any:
        seen[layer.index] = torch.cat(self.hidden)
        return inputs(self, layer, linears)

    monkeypatch.setattr(_Layers, "_inputs", recorded)
    quantize(asked_of(STARTED, model, tmp_path / "out"))
    merge_adapter(tmp_path / "out", tmp_path / "out" / "loftq_init", tmp_path / "merged", dtype="float32")
    ids = ModelFiles.open(str(model), CPU).sequences(str(DATA), 6, 48).sequences
    with torch.no_grad():
        hidden = load(tmp_path / "merged")(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.allclose(seen[1], hidden[1], atol=1e-4)


def test_stopped_while_the_adapter_is_put_together(
    billm: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers' files are gone, the folder is not there yet."""
    finish = GrowingAdapter.finish

    def stopped(self: GrowingAdapter, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(GrowingAdapter, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(asked_of(STARTED, model, tmp_path / "out"))
    monkeypatch.undo()
    quantize(asked_of(STARTED, model, tmp_path / "out"))
    files = sorted(path.relative_to(billm) for path in billm.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors"))
    assert all((billm / file).read_bytes() == (tmp_path / "out" / file).read_bytes() for file in files)


def test_stopped_with_an_adapter_on_some_layers(model: Path, tmp_path: Path) -> None:
    """The first layer, which is written, has no part of it."""
    lora = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "init_lora_weights": "loftq"}
    asked = replace(asked_of(STARTED, model, tmp_path / "out"), loftq=LoraSection.from_dict(lora))
    begin(asked)
    quantize(asked)
    adapter = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in adapter} == {"base_model.model.model.layers.1.self_attn.q_proj"}
    config = completed(RunConfig.from_dict(run_over(tmp_path / "out", {"format": "billm"}).to_dict() | {"lora": lora}))
    assert read_start(config)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_it_starts_over_no_other_base(billm: Path, model: Path) -> None:
    over = run_over(model, {"format": "hqq"})
    lora = {"init_from": str(billm / "loftq_init")}
    with pytest.raises(ConfigError, match=r"says 'loftq_rounds': .*: name .*billm, or start"):
        completed(replace(over, lora=LoraSection.from_dict(lora)))
    own = replace(run_over(billm, {"format": "billm"}), lora=LoraSection.from_dict(lora))
    assert completed(own).lora.values["r"] == 4


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"r": 8}, r"'lora.r' is 8, but .*loftq_init.*, where the adapter starts, says 4: make them equal"),
        ({"loftq_config": {"loftq_iter": 3}}, r"'lora.loftq_config.loftq_iter' is 3, but .* was made in 2 rounds"),
        ({"target_modules": ["q_proj"]}, r"'lora.target_modules' is \["),
        ({"r": 16}, r"'lora.r' is 16 \(the default\), but"),
        ({"loftq_config": {"loftq_bits": 3}}, r"'lora.loftq_config.loftq_bits' is 3, but .* holds codes in 2 bits"),
    ],
)
def test_a_run_that_says_another_adapter(lora: dict[str, Any], told: str, billm: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        completed(run_over(billm, {"format": "billm"}, **lora))


def test_a_folder_without_a_start(model: Path, tmp_path: Path) -> None:
    quantize(Quantizing(model=str(model), format="hqq", output=tmp_path / "plain"))
    config = run_over(tmp_path / "plain", {"format": "hqq"})
    assert completed(config) == config
    with pytest.raises(
        ValueError, match=r"is quantised already: .* or one that 'sparselora-dist quantize --loftq' made"
    ):
        loftq_start(config, Placement(CPU), None)
    with pytest.raises(ValueError, match=r"'quantization.format' is \"billm\".*'sparselora-dist quantize' makes such"):
        loftq_start(run_over(model, {"format": "billm"}), Placement(CPU), None)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({}, r"'lora.init_lora_weights' of .*run.json is true: --loftq takes the file of a run"),
        (LOFTQ | {"target_modules": ["lm_head"]}, "'lm_head', which is no matrix of a decoder layer"),
        (LOFTQ | {"r": 0}, "'lora.r' is 0"),
        (
            LOFTQ | {"modules_to_save": ["lm_head"]},
            "'lora.modules_to_save' of .*: a start beside the codes is of matrices",
        ),
        (LOFTQ | {"lora_bias": True}, "'lora.lora_bias' of .*run.json is true"),
        (
            LOFTQ | {"loftq_config": {"loftq_bits": 2}},
            "'lora.loftq_config.loftq_bits' is 2, but --format hqq stores in 4",
        ),
    ],
)
def test_bad_input_is_named(
    lora: dict[str, Any], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"lora": lora}))
    words = ["quantize", "--model", str(model), "--format", "hqq", "--loftq", str(tmp_path / "run.json")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "nothing is left"


def test_the_command(billm: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"lora": LOFTQ, "train": {}}))
    words = ["--format", "billm", "--data", str(DATA), "--sequences", "6", "--length", "48"]
    words += ["--loftq", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]
    assert main(["quantize", "--model", str(model), *words]) == 0
    assert f"starts there with the 'lora' section of {tmp_path / 'run.json'}" in capsys.readouterr().out
    name = "loftq_init/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (billm / name).read_bytes()
    edit_json(tmp_path / "out" / "loftq_init" / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ValueError, match="'peft_type' is 'IA3', only 'LORA' can be started from"):
        completed(run_over(tmp_path / "out", {"format": "billm"}))
