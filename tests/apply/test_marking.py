"""Whoever saves an adapter that was trained under a pruned model's zeros writes that down, and the merge goes by it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparselora_dist import SparseBaseConfig, SparseLoRAConfig, apply_sparselora, remove_sparselora
from sparselora_dist.io.adapter import save_adapter
from sparselora_dist.io.merge import merge_adapter
from support.compare import assert_close
from support.merging import load, logits, tensors
from support.models import ALL_LINEAR
from support.pruned import save_pruned

OFF = SparseLoRAConfig(enabled=False)
TARGETS = ["q_proj", "down_proj"]
MODULES = sorted(f"model.layers.{layer}.{name}" for layer in range(3) for name in ("mlp.down_proj", "self_attn.q_proj"))


def adapted(base: Any, targets: list[str], rank: int = 4) -> PeftModel:
    torch.manual_seed(4)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pruned(tmp_path_factory.mktemp("pruned") / "base", "2:4", dtype=torch.float32)


@pytest.fixture
def model(base: Path) -> PeftModel:
    model = adapted(load(base), TARGETS)
    return apply_sparselora(model, OFF, sparse_base=SparseBaseConfig())


def test_pefts_own_saving_writes_the_mark_and_the_merge_gives_the_models_logits(
    base: Path, model: PeftModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["sparse_base"] == {"modules": MODULES}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("under the zeros of a pruned base model, in 6 matrices") == 1
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert all(not after[f"{name}.weight"][before[f"{name}.weight"] == 0].any() for name in MODULES)
    assert_close("logits", logits(model), logits(load(tmp_path / "out")), rtol=2e-5, atol=2e-5)


def test_what_a_run_saves_is_marked(model: PeftModel, tmp_path: Path) -> None:
    """Its adapter folder, and those of its checkpoints."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, values, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["sparse_base"] == {"modules": MODULES}


def test_the_mark_stays_with_the_adapter(model: PeftModel, tmp_path: Path) -> None:
    """In copies of the config and of the model, behind remove_sparselora, and for adapters that come later."""
    config = model.peft_config["default"]
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(other, LoraConfig) and other.to_dict()["sparse_base"] == {"modules": MODULES}
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.add_adapter("later", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="trained under the mask of a pruned base"):
        remove_sparselora(model)
    model.save_pretrained(tmp_path / "removed")
    assert config_of(tmp_path / "copy")["sparse_base"] == config_of(tmp_path / "removed")["sparse_base"]
    later = config_of(tmp_path / "removed" / "later")
    assert later["sparse_base"] == {"modules": [name for name in MODULES if "q_proj" in name]}


def test_only_pruned_matrices_are_named_and_a_plain_adapter_has_no_mark(base: Path, tmp_path: Path) -> None:
    partly = adapted(load(base), ALL_LINEAR)
    dense = "base_model.model.model.layers.1.mlp.up_proj.base_layer"
    partly.get_submodule(dense).weight.data.normal_()
    apply_sparselora(partly, OFF, sparse_base=SparseBaseConfig())
    partly.save_pretrained(tmp_path / "partly")
    marked = config_of(tmp_path / "partly")["sparse_base"]["modules"]
    assert len(marked) == 20 and "model.layers.1.mlp.up_proj" not in marked
    plain = apply_sparselora(adapted(load(base), TARGETS), OFF)
    plain.save_pretrained(tmp_path / "plain")
    assert "sparse_base" not in config_of(tmp_path / "plain")
    assert "zeros of a pruned" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_config_of_a_class_of_its_own_is_refused(base: Path) -> None:
    class Own(LoraConfig):
        pass

    model = get_peft_model(load(base), Own(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the config of adapter 'default' is a Own: sparse_base masks adapters of"):
        apply_sparselora(model, OFF, sparse_base=SparseBaseConfig())
    assert apply_sparselora(model, OFF) is model
