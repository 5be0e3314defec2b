"""``lora.init_lora_weights`` "loftq": one base and one start on every engine, kept by a resumed run, known to a merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sparselora_dist.apply.loftq import LoftQStart, loftq_start
from sparselora_dist.config import LoraSection
from sparselora_dist.config.run import RunConfig
from sparselora_dist.io.load import load_base
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.quantizing.quantize import Quantizing, quantize
from sparselora_dist.sharding.placement import Placement
from support.harness import run_ranks
from support.merging import edit_json, load
from support.refusals import says
from support.trainer_workers import observe
from support.versions import can_nf4

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("alone")

FILE, SHIFT = "adapter_model.safetensors", "loftq.safetensors"
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"down_proj": 5},
    "use_rslora": True,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "init_lora_weights": "loftq",
    "loftq_config": {"loftq_iter": 2},
}
STORED = {"format": "hqq", "bits": 3}
IDS = torch.arange(3, 35).reshape(2, 16)
CPU = torch.device("cpu")


def starting(tiny: Tiny, engine: str, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    train = {"max_steps": 3, "save_steps": 2, **sections.pop("train", {})}
    stored = STORED | sections.pop("quantization", {})
    config = tiny.config(engine, out, train=train, data={"eval": None}, quantization=stored, **sections)
    return config | {"lora": LORA}


def start_of(config: dict[str, Any]) -> LoftQStart:
    found = loftq_start(RunConfig.from_dict(config), Placement(CPU), None)
    assert found is not None
    return found


def beside(tiny: Tiny, engine: str, model: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run over a folder that has its start in it."""
    stored = {"model": {"name_or_path": str(model)}, "quantization": {"bits": None, "format": "billm"}}
    return starting(tiny, engine, out, **stored, **sections)


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised with data, and where the adapter of these runs starts over it."""
    output = tmp_path_factory.mktemp("made") / "billm"
    lora = LoraSection.from_dict(LORA)
    quantize(
        Quantizing(model=tiny.model, format="billm", output=output, data=tiny.train, sequences=8, length=48, loftq=lora)
    )
    return output


@pytest.fixture(scope="module")
def runs(tiny: Tiny, made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Where they are, and what was seen of each; one resumes at another number of ranks, under another engine."""
    folder = tmp_path_factory.mktemp("loftq")
    still = {"max_steps": 1, "save_steps": None, "learning_rate": 1e-30}
    single = starting(tiny, "single", folder / "single")
    other = "fsdp2" if can_nf4("fsdp2") else "zero3"
    jobs: dict[str, tuple[dict[str, Any], Any]] = {
        "zero3": (starting(tiny, "zero3", folder / "zero3"), None),
        "bf16": (starting(tiny, "zero3", folder / "bf16", model={"dtype": "bfloat16"}, train=still), None),
        "beside": (beside(tiny, "zero3", made, folder / "beside"), None),
        "beside resumed": (
            beside(tiny, other, made, folder / "beside resumed", train={"resume": True}),
            (folder / "alone", 2),
        ),
        "resumed": (starting(tiny, other, folder / "resumed", train={"resume": True}), (folder / "single", 2)),
    }
    seen = {"single": observe(single, IDS), "alone": observe(beside(tiny, "single", made, folder / "alone"), IDS)}
    results = run_ranks("support.trainer_workers:many_runs", 2, list(jobs.values()), IDS)[0]
    return folder, seen | dict(zip(jobs, results, strict=True))


def test_engines_store_one_base_and_train_one_adapter(runs: Any) -> None:
    folder, seen = runs
    single, shift = seen["single"], load_file(folder / "single" / "adapter" / SHIFT)
    assert len(shift) == 2 * 3 * 7
    for name in ("zero3", "resumed"):
        got = load_file(folder / name / "adapter" / SHIFT)
        assert got.keys() == shift.keys() and all(torch.equal(got[key], shift[key]) for key in shift), name
        assert torch.allclose(seen[name]["logits"], single["logits"], atol=1e-4), name
    first, other = (seen[name]["summary"]["train_loss_first"] for name in ("single", "zero3"))
    assert other == pytest.approx(first, rel=1e-5)


def test_over_a_folder_with_its_start_engines_train_one_adapter(runs: Any, made: Path, tmp_path: Path) -> None:
    """Which is one of that folder like any other: nothing marks it, and a merge takes the folder as it is."""
    folder, seen = runs
    alone, sharded = (seen[name] for name in ("alone", "beside"))
    assert sharded["summary"]["train_loss_first"] == pytest.approx(alone["summary"]["train_loss_first"], rel=1e-5)
    for one in (sharded, seen["beside resumed"]):
        assert torch.allclose(one["logits"], alone["logits"], atol=1e-4)
    start, trained = (load_file(path / FILE) for path in (made / "loftq_init", folder / "alone" / "adapter"))
    assert start.keys() == trained.keys() and len(start) == 42
    # Three steps of 5e-3 do not go far.
    assert all((start[name] - trained[name]).abs().max() < 0.02 for name in start)
    said = json.loads((folder / "alone" / "adapter" / "adapter_config.json").read_text())
    assert not {"loftq", "loftq_rounds"} & said.keys() and not (folder / "alone" / "adapter" / SHIFT).exists()
    merge_adapter(made, folder / "alone" / "adapter", tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "merged")(input_ids=IDS).logits, alone["logits"], atol=1e-4)


def test_a_resumed_run_decomposes_nothing(runs: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = runs
    monkeypatch.setattr("sparselora_dist.apply.loftq.alternate", lambda *_, **__: pytest.fail("decomposed"))
    config = RunConfig.from_dict(starting(tiny, "single", folder / "single"))
    again = loftq_start(config, Placement(CPU), folder / "single" / "checkpoint-2" / "adapter")
    assert again is not None and not again.pairs and len(again.shift.pairs) == 21


def test_masters_start_at_the_factors_unrounded(runs: Any, tiny: Tiny) -> None:
    """The parameters of ZeRO-3 in bf16 are their masters rounded."""
    folder, _ = runs
    start = start_of(starting(tiny, "single", folder / "none", model={"dtype": "bfloat16"}))
    saved = load_file(folder / "bf16" / "adapter" / FILE)
    assert len(saved) == 42 and any(not torch.equal(value.bfloat16().float(), value) for value in saved.values())
    for module, pair in start.pairs.items():
        for side, value in zip("AB", pair):
            got = saved[f"base_model.model.{module}.lora_{side}.weight"]
            assert torch.allclose(got, value, rtol=1e-6, atol=1e-9), (module, side)


def test_the_base_is_the_checkpoint_less_the_shift(runs: Any, tiny: Tiny) -> None:
    """And with the start it is nearer to the checkpoint than it is without, in every matrix."""
    config = starting(tiny, "single", runs[0] / "none")
    parsed, start = RunConfig.from_dict(config), start_of(config)
    plain = load(Path(tiny.model))
    first = load_base(parsed.model, parsed.quantization, Placement(CPU))
    base = load_base(parsed.model, parsed.quantization, Placement(CPU), shift=start.shift)
    moved = 0
    for layer, own, bare in zip(decoder_layers(plain), decoder_layers(base.model), decoder_layers(first.model)):
        for name in layer.names:
            module, weight = layer.path_of(name), layer.matrix(name).weight
            linear, without = own.matrix(name), bare.matrix(name)
            stored, before = (one.matrix(one.parts, torch.float32) for one in (linear, without))
            a, b = start.pairs[module]
            rank = 3 if module.endswith("1.self_attn.q_proj") else 4
            scaling = (5 if name == "down_proj" else 12) / rank**0.5
            assert a.shape[0] == rank
            assert (weight - stored - scaling * b @ a).norm() < 0.99 * (weight - before).norm(), module
            moved += not torch.equal(stored, before)
            if name not in ("o_proj", "down_proj"):
                assert torch.equal(base.weights.get(layer.index, name), stored)
                assert base.weights.mark(layer.index, name) != first.weights.mark(layer.index, name)
    assert moved == 21


def test_a_merge_stores_the_base_as_training_did(runs: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder, seen = runs
    adapter = folder / "single" / "adapter"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["loftq"] == {**STORED, "double_quant": False, "rounds": 2} and said["init_lora_weights"] is True
    merge_adapter(tiny.model, adapter, tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        got = load(tmp_path / "merged")(input_ids=IDS, use_cache=False).logits
        # What it is over the base in full precision, as PEFT puts it there, is another model.
        other = PeftModel.from_pretrained(load(Path(tiny.model)), adapter).eval()(input_ids=IDS).logits
    assert torch.allclose(got, seen["single"]["logits"], atol=1e-4)
    assert not torch.allclose(other, seen["single"]["logits"], atol=1e-2)
    card = (adapter / "README.md").read_text()
    assert "started by LoftQ" in card and "| started from | LoftQ, 2 rounds |" in card and "in hqq of 3 bits" in card
    merge_adapter(tiny.model, adapter, tmp_path / "said", dtype="float32", format="hqq", bits=3)
    with pytest.raises(ValueError, match=r"'loftq' says .* hqq of 3 bits, but bcq of 3 bits is asked for"):
        merge_adapter(tiny.model, adapter, tmp_path / "out", format="bcq", bits=3)
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / SHIFT).unlink()
    with pytest.raises(ValueError, match=rf"lacks {SHIFT}: its adapter started after 2 rounds of LoftQ"):
        merge_adapter(tiny.model, copy, tmp_path / "out")
    edit_json(copy / "adapter_config.json", loftq={"format": "hqq"})
    with pytest.raises(ValueError, match=r"'loftq' is .*expected format, bits, double_quant, rounds"):
        merge_adapter(tiny.model, copy, tmp_path / "out")


def test_what_loftq_cannot_start(runs: Any, tiny: Tiny, refused: Callable) -> None:
    folder, _ = runs
    words = ["--quantization.format", "hqq", "--lora.init_lora_weights", "loftq"]
    says(
        refused(*words, "--lora.target_modules", '["q_proj", "lm_head"]'), "'lm_head', which is no matrix of a decoder"
    )
    adapter = str(folder / "single" / "adapter")
    says(refused("--lora.init_from", adapter, "--quantization.format", "hqq"), "says 'loftq'", "another base")
    resumed = ["--train.resume", str(folder / "single" / "checkpoint-2"), *words, "--quantization.bits", "3"]
    says(refused(*resumed), "other settings", "lora.loftq_config")
