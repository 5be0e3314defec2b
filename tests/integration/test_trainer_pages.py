"""The commands of docs/trainers on two ranks, each engine: losses and masks of one process, files, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, selection
from support.harness import ROOT
from support.trainer_pages import Command, clone, commands, run_all
from support.versions import ACCELERATE_FSDP2

from .conftest import Tiny, task_rows

pytestmark = pytest.mark.usefixtures("alone")
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
# Accelerate's name, DeepSpeed's stage, and what the frozen weights are.
HELD = {
    "single": ("NO", None, {"Parameter"}),
    "ddp": ("MULTI_CPU", None, {"Parameter"}),
    "zero2": ("DEEPSPEED", 2, {"Parameter"}),
    "zero3": ("DEEPSPEED", 3, {"zero3"}),
    "fsdp2": ("FSDP", None, {"DTensor"}),
}
# Whether save_model writes an adapter, and what is changed in configs/trainer/fsdp2.json.
FSDP_OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "sharded": (False, {"state_dict_type": "SHARDED_STATE_DICT"}),
    "lean": (True, {"activation_checkpointing": True, "cpu_ram_efficient_loading": True}),
}
SAVED_AT = 4
Seen = list[dict[str, dict[str, Any]]]


def again(command: Command, *more: str, to: str = "again") -> list[Any]:
    """The run of ``command`` in another folder; ``to`` "again": from its checkpoint."""
    folder = f"runs/{command.name}"
    resume = ("--resume_from_checkpoint", f"{folder}/checkpoint-{SAVED_AT}") if to == "again" else ()
    return [f"{command.name} {to}", [*command.script, *more, "--output_dir", f"{folder}-{to}", *resume]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone"), rows=48)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    """One process: the Trainer with interval 1 and 4, and SFTTrainer with the same rows a step."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        (trainer,) = (c for c in commands("trainer.md") if c.launcher == ("python",))
        (sft,) = (c for c in commands("sft.md") if c.launcher[0] == "torchrun")
        runs = [
            ["trainer", list(trainer.script)],
            ["kept", [*trainer.script, "--sparse_lora", "interval4.json", "--output_dir", "runs/kept"]],
            ["sft", [*sft.script, "--per_device_train_batch_size", "4", "--output_dir", "runs/sft-single"]],
        ]
        return run_all(("python",), runs, folder)[0]


def check(name: str, engine: str, expected: dict[str, Any], ranks: Seen, folder: Path) -> None:
    """A run of two ranks is that of one process, and what it leaves is an adapter."""
    for rank in ranks:
        seen = rank[name]
        assert (seen["engine"], seen["stage"], seen["weights"]) == HELD[engine]
        assert seen["ranks"] == 2 and seen["checkpointing"]
        assert seen["active"] == expected["active"] == [0.0] + [1.0] * 5
        same_masks(expected["masks"], seen["masks"])
        torch.testing.assert_close(torch.tensor(seen["losses"]), torch.tensor(expected["losses"]), rtol=1e-6, atol=0)
    adapter(folder / "runs" / name), adapter(folder / "runs" / name / f"checkpoint-{SAVED_AT}")


def check_resumed(name: str, resumed: str, ranks: Seen, folder: Path) -> None:
    """Bit for bit what the run does that was not stopped."""
    if ranks[0][name]["engine"] == "FSDP" and not ACCELERATE_FSDP2:
        return
    for rank in ranks:
        same_masks(rank[name]["masks"][SAVED_AT:], rank[resumed]["masks"])
        assert rank[resumed]["losses"] == rank[name]["losses"]
    whole, got = (adapter(folder / "runs" / run) for run in (name, resumed.replace(" ", "-")))
    assert all(torch.equal(whole[key], got[key]) for key in whole)


def same_masks(expected: list[dict], got: list[dict]) -> None:
    for one, other in zip(expected, got, strict=True):
        assert one.keys() == other.keys()
        for layer, groups in one.items():
            assert groups.keys() == other[layer].keys()
            assert all(torch.equal(groups[group], other[layer][group]) for group in groups)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    assert len(found) == 40 and all(tensor.numel() for tensor in found.values())
    return found


@pytest.fixture(scope="module")
def torchrun(folder: Path) -> Seen:
    """Every torchrun command of the pages, in one start: the script's arguments choose the engine."""
    found = [c for page in ("trainer.md", "sft.md") for c in commands(page) if c.launcher[0] == "torchrun"]
    assert {c.launcher for c in found} == {found[0].launcher}
    runs = [run for c in found for run in ([c.name, list(c.script)], again(c))]
    (fsdp2,) = (c for c in found if c.name == "trainer-fsdp2")
    for name, (_, options) in FSDP_OPTIONS.items() if ACCELERATE_FSDP2 else ():
        file = folder / f"{name}.json"
        own = json.loads((ROOT / "configs" / "trainer" / "fsdp2.json").read_text(encoding="utf-8"))
        file.write_text(json.dumps(own | options), encoding="utf-8")
        script = [*fsdp2.script, "--fsdp_config", str(file), "--output_dir", f"runs/{name}"]
        command = Command(fsdp2.launcher, (*script, "--gradient_checkpointing", str("sharded" in name)))
        runs += [[name, list(command.script)], again(command, to="again")]
    return run_all(found[0].launcher, runs, folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trainer_by_torchrun(engine: str, folder: Path, one: dict[str, dict[str, Any]], torchrun: Seen) -> None:
    name = f"trainer-{engine}"
    check(name, engine, one["trainer"], torchrun, folder)
    check_resumed(name, f"{name} again", torchrun, folder)


def test_sft_by_torchrun(folder: Path, one: dict[str, dict[str, Any]], torchrun: Seen) -> None:
    check("sft-ddp", "ddp", one["sft"], torchrun, folder)
    check_resumed("sft-ddp", "sft-ddp again", torchrun, folder)


@pytest.mark.skipif(not ACCELERATE_FSDP2, reason="needs Accelerate 1.15")
@pytest.mark.parametrize("name", FSDP_OPTIONS)
def test_options_of_fsdp2(name: str, folder: Path, one: dict[str, dict[str, Any]], torchrun: Seen) -> None:
    """Another kind of checkpoint; and its own recomputation, with weights that rank 0 hands out."""
    has_adapter, _ = FSDP_OPTIONS[name]
    for rank in torchrun:
        same_masks(one["trainer"]["masks"], rank[name]["masks"])
        assert (rank[name]["engine"], rank[name]["weights"]) == ("FSDP", {"DTensor"})
        losses = torch.tensor(rank[name]["losses"])
        torch.testing.assert_close(losses, torch.tensor(one["trainer"]["losses"]), rtol=1e-6, atol=0)
        assert rank[f"{name} again"]["losses"] == rank[name]["losses"]
    assert (folder / "runs" / name / "adapter_model.safetensors").is_file() == has_adapter


@pytest.mark.parametrize("engine", ENGINES)
def test_by_accelerate_launch(engine: str, folder: Path, one: dict[str, dict[str, Any]]) -> None:
    """The Trainer with masks that are held over the checkpoint, SFTTrainer with new ones each step."""
    (trainer,) = (c.with_engine(engine) for c in commands("accelerate.md"))
    (sft,) = (c.with_engine(engine) for c in commands("sft.md") if c.launcher[0] == "accelerate")
    assert trainer.launcher == sft.launcher
    keep = Command(trainer.launcher, (*trainer.script, "--sparse_lora", "interval4.json"))
    runs = [run for c in (keep, sft) for run in ([c.name, list(c.script)], again(c))]
    ranks = run_all(trainer.launcher, runs, folder)
    for command, expected in ((keep, "kept"), (sft, "sft")):
        check(command.name, engine, one[expected], ranks, folder)
        check_resumed(command.name, f"{command.name} again", ranks, folder)
    masks = one["kept"]["masks"]
    same_masks(masks[1:5], masks[1:2] * 4)
    assert any(not torch.equal(masks[1][n][g], masks[5][n][g]) for n in masks[1] for g in masks[1][n])
    state = json.loads((folder / "runs" / keep.name / f"checkpoint-{SAVED_AT}" / "trainer_state.json").read_text())
    held = state["stateful_callbacks"]["SparseLoRACallback"]["attributes"]["held"]
    assert held.keys() == {"all"} and len(held["all"]) == sum(len(groups) for groups in masks[1].values())
    for key, channels in held["all"].items():
        layer, group, step = key.split(".")
        assert int(step) == 1 and [int(c) for c in channels.split()] == masks[1][int(layer)][group].tolist()

    base = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, folder / "runs" / keep.name)
    loaded = {name.replace(".default", ""): p for name, p in plain.named_parameters() if "lora_" in name}
    saved = adapter(folder / "runs" / keep.name)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_trl_makes_the_peft_model_itself(tiny: Tiny, tmp_path: Path) -> None:
    """Then the callback's configuration is applied to it, before training begins."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    settings = {"rank": 4, "start_step": 0.5, "layers": {"ffn": {"1": 0.7}}}
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list(task_rows(16, seed=0)),
        processing_class=AutoTokenizer.from_pretrained(tiny.model),
        callbacks=[SparseLoRACallback(SparseLoRAConfig.from_dict(settings))],
    )
    trainer.train()
    assert [row["sparsity/active"] for row in trainer.state.log_history if "loss" in row] == [0.0, 1.0]
    assert {layer: set(groups) for layer, groups in selection(trainer.model).items()} == {1: {"ffn"}}
