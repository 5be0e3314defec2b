"""The Axolotl plugin through the calls that Axolotl makes; its own code needs other versions of everything, so not here.

The calls are those of its ``PluginManager``, ``merge_input_args``, ``ModelLoader.load`` and its trainer builder, in order.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from transformers import Trainer

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from support.harness import ROOT
from support.models import tiny_base
from support.stand_ins import axolotl_train
from support.trainer_pages import blocks, clone
from support.trainer_workers import arguments, trainer_rows

pytestmark = pytest.mark.usefixtures("alone")
SECTION = {"rank": 4, "start_step": 0.5, "layers": {"ffn": {"1-2": 0.7}, "qk": {"1": 0.5}}}


class Answers(dict):
    """As Axolotl's: None for what is not there, names as attributes."""

    def __missing__(self, key: str) -> None:
        return None

    __getattr__ = dict.__getitem__


def answers(value: Any, kind: type = Answers) -> Any:
    return kind({k: answers(v, kind) for k, v in value.items()}) if isinstance(value, dict) else value


class InputConfig(BaseModel):
    model_config = ConfigDict(extra="allow")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded by the name that examples/axolotl.yaml has."""
    names = ["axolotl", "axolotl.integrations", "axolotl.integrations.base"]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (path,) = example()["plugins"]
    module_name, class_name = path.rsplit(".", 1)
    monkeypatch.delitem(sys.modules, module_name, raising=False)
    yield getattr(importlib.import_module(module_name), class_name)()
    sys.modules.pop(module_name, None)


def example() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples" / "axolotl.yaml").read_text(encoding="utf-8"))


def read(plugin: Any, written: dict[str, Any]) -> Answers:
    """What Axolotl makes of a YAML: the plugin sees it as it was written, then its arguments are checked with all others."""
    cfg = answers(written)
    plugin.register(cfg)
    module_name, class_name = plugin.get_input_args().rsplit(".", 1)
    own = getattr(importlib.import_module(module_name), class_name)

    class AxolotlInputConfig(InputConfig, own):
        pass

    return answers(AxolotlInputConfig(**answers(cfg, dict)).model_dump(exclude_none=True))


def peft_model(base: Any) -> Any:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def trained(model: Any, folder: Path, callbacks: list[Any]) -> Trainer:
    training = arguments(folder, use_cpu=True, max_steps=4)
    trainer = Trainer(model=model, args=training, train_dataset=trainer_rows(), callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The three lines."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        model = apply_sparselora(peft_model(tiny_base()), SparseLoRAConfig.from_dict(SECTION))
        return trained(model, tmp_path_factory.mktemp("expected"), [SparseLoRACallback()])


def same_run(expected: Trainer, got: Trainer) -> None:
    keys = ("loss", "sparsity/active", "sparsity/context_share")
    rows = [[{key: row[key] for key in keys} for row in t.state.log_history if "loss" in row] for t in (expected, got)]
    assert rows[0] == rows[1] and [row["sparsity/active"] for row in rows[0]] == [0, 0, 1, 1]
    assert selection(got.model).keys() == selection(expected.model).keys() == {1}  # The last layer is dense.


def test_the_section_trains_as_the_three_lines_do(plugin: Any, expected: Trainer, tmp_path: Path) -> None:
    cfg = read(plugin, {"adapter": "lora", "sparse_lora": SECTION})
    assert [cfg[f"lora_{part}_kernel"] for part in ("mlp", "qkv", "o")] == [False] * 3
    model = peft_model(tiny_base())
    plugin.post_model_load(cfg, model)
    same_run(expected, trained(model, tmp_path, plugin.add_callbacks_pre_trainer(cfg=cfg, model=model)))


def test_a_callback_with_a_configuration_trains_as_the_three_lines_do(expected: Trainer, tmp_path: Path) -> None:
    """What is left to a program that builds its Trainer itself, as LLaMA-Factory does."""
    callback = SparseLoRACallback(SparseLoRAConfig.from_dict(SECTION))
    same_run(expected, trained(peft_model(tiny_base()), tmp_path, [callback]))


def test_the_page_s_command(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that it names, whose plugin this is, by its own keys from its data to its adapter."""
    (command,) = blocks("axolotl.md")
    program, verb, file = shlex.split(command)
    assert (program, verb) == ("axolotl", "train")
    monkeypatch.chdir(clone(tmp_path, rows=80))
    cfg = read(plugin, yaml.safe_load(Path(file).read_text(encoding="utf-8")))

    def before(model: Any) -> list[Any]:
        plugin.post_model_load(cfg, model)
        return plugin.add_callbacks_pre_trainer(cfg=cfg, model=model)

    trainer = axolotl_train(cfg, before)
    assert {g: set(by_layer) for g, by_layer in find_state(trainer.model).sparsity.items()} == {
        "ffn": {1, 2, 3, 4},
        "qk": {2, 3, 4},
        "vo": {2, 3, 4},
    }
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["sparsity/active"] for row in logged] == [0] + [1] * 19
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    assert len(load_file(tmp_path / cfg.output_dir / "adapter_model.safetensors")) == 40


def test_the_page_s_section(plugin: Any) -> None:
    """On a model of as many layers as it names."""
    (section,) = blocks("axolotl.md", "yaml")
    written = yaml.safe_load(section)
    assert written["plugins"] == example()["plugins"] and written["adapter"] == "lora"
    model = peft_model(tiny_base(num_hidden_layers=32))
    plugin.post_model_load(read(plugin, written), model)
    assert find_state(model).sparsity == {"ffn": dict.fromkeys(range(3, 31), 0.99)}


def test_without_the_section_nothing_happens(plugin: Any) -> None:
    cfg, model = read(plugin, {"adapter": "lora", "lora_mlp_kernel": True}), peft_model(tiny_base())
    plugin.post_model_load(cfg, model)
    assert cfg["lora_mlp_kernel"] is True and find_state(model) is None
    assert plugin.add_callbacks_pre_trainer(cfg, model) == []


@pytest.mark.parametrize("key", ["lora_mlp_kernel", "liger_glu_activation", "cut_cross_entropy"])
def test_what_replaces_the_same_modules_is_refused(key: str, plugin: Any) -> None:
    with pytest.raises(ValueError, match=f"sparse_lora with {key}"):
        read(plugin, {"sparse_lora": SECTION, key: True})


def test_a_wrong_section_is_refused_when_it_is_read(plugin: Any) -> None:
    with pytest.raises(ValidationError, match=r"sparse_lora\.layers\.ffn.*1\.9"):
        read(plugin, {"sparse_lora": {"layers": {"ffn": {"1-2": 1.9}}}})
    with pytest.raises(ValidationError, match=r"intervall.*interval"):
        read(plugin, {"sparse_lora": {**SECTION, "intervall": 2}})
