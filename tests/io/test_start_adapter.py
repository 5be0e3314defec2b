"""What a run takes from the adapter that it starts from, what it must say itself, and how tensors may be called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselora_dist.cli import main
from sparselora_dist.config import ConfigError, RunConfig
from sparselora_dist.io.start_adapter import completed, read_start
from support.merging import edit_json, make_adapter, save_base

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SETTINGS: dict[str, Any] = {
    "r": 6,
    "lora_alpha": 5,
    "rank_pattern": {"q_proj": 3},
    "use_rslora": True,
    "target_modules": ["down_proj", "q_proj"],
    "modules_to_save": ["lm_head"],
}
SAID = {key: SETTINGS[key] for key in ("r", "lora_alpha", "target_modules")}
REST = {key: SETTINGS[key] for key in ("rank_pattern", "use_rslora", "modules_to_save")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base")
    make_adapter(folder / "adapter", folder / "base", **SETTINGS, lora_dropout=0.25)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """With an adapter that may be changed."""
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return tmp_path


def run_of(made: Path, init_from: Path, **lora: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(made / "base"), "dtype": "float32"},
            "data": {"train": "rows.jsonl"},
            "train": {"output_dir": "out"},
            "lora": {"init_from": str(init_from), **lora},
        }
    )


def test_what_the_run_does_not_say_is_the_adapters(made: Path) -> None:
    lora = completed(run_of(made, made / "adapter")).lora
    assert lora.values == {**SETTINGS, "lora_dropout": 0.25, "task_type": "CAUSAL_LM"}
    assert lora.init_from == str(made / "adapter")
    # A setting of training is the run's own; values of both that are equal are no contradiction, in any order.
    same = {"lora_dropout": 0.0, "r": 6, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}}
    lora = completed(run_of(made, made / "adapter", **same)).lora
    assert lora.values == {**SETTINGS, **same, "task_type": "CAUSAL_LM"}
    assert RunConfig.from_dict(completed(run_of(made, made / "adapter")).to_dict()).lora.values["r"] == 6


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [
        ("r", 8, "6"),
        ("lora_alpha", 12, "5"),
        ("use_rslora", False, "true"),
        ("rank_pattern", {}, '{"q_proj": 3}'),
        ("alpha_pattern", {"q_proj": 2}, "{}"),
        ("target_modules", ["q_proj"], '["down_proj", "q_proj"]'),
        ("modules_to_save", None, '["lm_head"]'),
        ("layers_to_transform", [0], "null"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(made: Path, key: str, value: Any, theirs: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        completed(run_of(made, made / "adapter", **{key: value}))
    assert f"'lora.{key}' is {json.dumps(value)}, but" in str(refusal.value)
    assert f"says {theirs}: leave 'lora.{key}' out" in str(refusal.value)


def test_an_expression_is_judged_by_the_tensors(made: Path) -> None:
    start = read_start(completed(run_of(made, made / "adapter", target_modules=".*(q|down)_proj")))
    assert start and len(start.tensors) == 2 * 2 * 3 + 1
    with pytest.raises(ValueError, match=r"up_proj.lora_A.weight' \(and 5 more\) is missing: 'lora.target_modules' is"):
        read_start(completed(run_of(made, made / "adapter", target_modules=".*(q|down|up)_proj")))


NAMES: dict[str, Callable[[str], str]] = {
    "as PEFT writes them": lambda name: name,
    "without the prefix": lambda name: name.removeprefix(PREFIX),
    "with an adapter's name": lambda name: name.replace(".weight", ".default.weight").replace(
        "lm_head.default", "lm_head.modules_to_save.default"
    ),
    "of another name, without the prefix": lambda name: (
        name.removeprefix(PREFIX).replace(".weight", ".my-task.weight") if ".lora_" in name else name
    ),
}


@pytest.mark.parametrize("named", NAMES.values(), ids=NAMES)
def test_a_bare_file_by_any_name(made: Path, tmp_path: Path, named: Callable[[str], str]) -> None:
    """What a hypernetwork writes: bf16, a number for a name, and no config, or a copied one."""
    held = load_file(made / "adapter" / FILE)
    save_file({named(name): tensor.bfloat16() for name, tensor in held.items()}, tmp_path / "7.safetensors")
    config = completed(run_of(made, tmp_path / "7.safetensors", **SAID, **REST))
    start = read_start(config)
    assert start and start.tensors.keys() == held.keys()
    for name, tensor in start.tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, held[name].bfloat16().float()), name
    assert config.lora.build().use_rslora
    shutil.copy(made / "adapter" / "adapter_config.json", tmp_path)
    again = read_start(completed(run_of(made, tmp_path / "7.safetensors")))
    assert again and again.sha256 == start.sha256


def test_a_bare_file_whose_settings_nobody_says(made: Path, folder: Path) -> None:
    (folder / "adapter" / "adapter_config.json").unlink()
    bare = folder / "adapter" / FILE
    for missing in (["r", "lora_alpha", "target_modules"], ["lora_alpha"]):
        words = {key: value for key, value in SAID.items() if key not in missing}
        with pytest.raises(ConfigError) as refusal:
            completed(run_of(made, bare, **words, **REST))
        assert f"the run must say {', '.join(f'lora.{key}' for key in missing)} (its tensors:" in str(refusal.value)
        assert "rank 3, 6 on down_proj, lm_head, q_proj; no file says its alpha" in str(refusal.value)
    with pytest.raises(ValueError, match=r"its rank is 3, and 'lora.r' with 'lora.rank_pattern' says 6"):
        read_start(completed(run_of(made, bare, **SAID, modules_to_save=["lm_head"])))
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        completed(run_of(made, bare.parent, **SAID))


def test_two_adapters_in_a_file(made: Path, tmp_path: Path) -> None:
    held = load_file(made / "adapter" / FILE)
    one = next(name for name in held if name.endswith("lora_A.weight"))
    save_file(held | {one.replace(".weight", ".other.weight"): held[one].clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="which are one tensor of an adapter: keep one adapter"):
        read_start(completed(run_of(made, tmp_path / "two.safetensors", **SAID, **REST)))


def test_two_starts_and_other_methods(made: Path, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'lora.init_lora_weights' is \"gaussian\", and 'lora.init_from'.*remove one"
    ):
        run_of(made, folder / "adapter", init_lora_weights="gaussian")
    with pytest.raises(ConfigError, match=r"not read yet: 'lora.lora_alpha' is not known"):
        run_of(made, folder / "adapter").lora.build()
    edit_json(folder / "adapter" / "adapter_config.json", bias="all")
    with pytest.raises(ConfigError, match=r"'lora.bias' is \"all\".*adapter_config.json says"):
        completed(run_of(made, folder / "adapter"))
    edit_json(folder / "adapter" / "adapter_config.json", bias="none", peft_type="IA3")
    with pytest.raises(ValueError, match="'peft_type' is 'IA3', only 'LORA' can be started from"):
        completed(run_of(made, folder / "adapter"))


def test_a_plan_counts_the_adapters_own_ranks(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(folder / "adapter" / "adapter_config.json", modules_to_save=None)
    lora = []
    for section in (
        {"init_from": str(folder / "adapter")},
        {**SETTINGS, "modules_to_save": None, "lora_dropout": 0.25},
    ):
        config = run_of(made, folder / "adapter").to_dict() | {"lora": section}
        (folder / "run.json").write_text(json.dumps(config))
        main(["plan", "--config", str(folder / "run.json"), "--gpus", "2", "--json"])
        lora.append([layout["bytes_per_gpu"]["lora"] for layout in json.loads(capsys.readouterr().out)["layouts"]])
    assert lora[0] == lora[1] and lora[0][0] > 0
