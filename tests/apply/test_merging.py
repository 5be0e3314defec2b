"""Merged, unloaded and saved whole, a sparse model is the family's own: names, values and files as from plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparselora_dist import apply_sparselora, remove_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.codecs import NF4Codec
from sparselora_dist.config import ModelSection, QuantizationSection
from sparselora_dist.io.load import load_base
from sparselora_dist.sharding.placement import Placement
from support.applied import assert_identical, config, families, outputs, sparse_model
from support.models import ALL_LINEAR, batch, tiny_base, tiny_lora

FFN_ONLY: dict[str, Any] = {"layers": {"ffn": {"0-2": 0.8}}}
# Adapters beside sparse layers, in them, and both.
cases = pytest.mark.parametrize(
    ("targets", "options"),
    [(["q_proj", "v_proj"], FFN_ONLY), (ALL_LINEAR, {}), (["v_proj", "down_proj"], {})],
    ids=["beside", "all", "some"],
)


def same_state(expected: nn.Module, got: nn.Module) -> None:
    """Names in their order, values bit for bit."""
    one, other = expected.state_dict(), got.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def logits(model: nn.Module) -> Tensor:
    data = {name: tensor for name, tensor in batch(seed=9).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**data).logits


@cases
@pytest.mark.parametrize("method", ["merge", "safe merge", "unload"])
def test_unloaded_it_is_plain_pefts_model(
    targets: list[str], options: dict[str, Any], method: str, tmp_path: Path
) -> None:
    def unloaded(model: Any) -> Any:
        if method == "unload":
            return model.unload()
        return model.merge_and_unload(safe_merge=method == "safe merge")

    expected = unloaded(tiny_lora(targets=targets))
    model = sparse_model(targets=targets, **options)
    got = unloaded(model)
    same_state(expected, got)
    assert [type(m) for m in got.modules()] == [type(m) for m in expected.modules()]
    assert find_state(model) is None and not hasattr(got, "_sparselora")
    got.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(expected))


@families
def test_a_whole_model_is_saved_and_loaded_by_the_familys_names(family: str, tmp_path: Path) -> None:
    plain = tiny_base(family).requires_grad_(False)
    model = apply_sparselora(copy.deepcopy(plain).train(), config())
    same_state(plain, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    other = tiny_base(family, seed=5)
    model.load_state_dict(other.state_dict())
    same_state(other, model)
    assert torch.equal(logits(remove_sparselora(model)), logits(other))


def loaded(folder: Path, quantization: QuantizationSection) -> Any:
    """As a run loads it, its matrices stored by channel, with LoRA on all of them; and made sparse."""
    tiny_base().save_pretrained(folder)
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    base = load_base(section, quantization, Placement(torch.device("cpu"))).model
    lora = peft.LoraConfig(r=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    return apply_sparselora(peft.get_peft_model(base, lora), config(**FFN_ONLY))


def test_a_model_as_a_run_loads_it(tmp_path: Path) -> None:
    """Also the matrices that are never sparse are put back."""
    model = loaded(tmp_path, QuantizationSection())
    adapter = peft.get_peft_model_state_dict(model)
    plain = peft.get_peft_model(tiny_base(), model.peft_config["default"])
    torch.manual_seed(2)
    for name, tensor in adapter.items():
        adapter[name] = torch.randn_like(tensor)
    for one in (plain, model):
        peft.set_peft_model_state_dict(one, adapter)
        one.merge_adapter(safe_merge=True)
    same_state(plain.get_base_model(), model.get_base_model())
    for one in (plain, model):
        one.unmerge_adapter()
    expected, got = plain.merge_and_unload(), model.merge_and_unload(safe_merge=True)
    same_state(expected, got)
    assert [type(m) for m in got.modules()] == [type(m) for m in expected.modules()]


def test_a_model_in_nf4_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = loaded(tmp_path, QuantizationSection(load_in_4bit=True))
    for call in (model.merge_adapter, model.unload, model.get_base_model().model.layers[0].mlp.up_proj.merge):
        with pytest.raises(ValueError, match=r"stored as nf4: .*sparselora-dist merge"):
            call()
    outputs(model)


@cases
def test_the_base_inside_peft(targets: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    plain, model = tiny_lora(targets=targets), sparse_model(targets=targets, **options)
    same_state(plain.get_base_model(), model.get_base_model())
    for one, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "sparse")):
        one.get_base_model().save_pretrained(folder)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "sparse/model.safetensors").read_bytes()
    if hasattr(peft, "get_base_model_state_dict"):
        expected, got = peft.get_base_model_state_dict(plain), peft.get_base_model_state_dict(model)
        assert list(got) == list(expected) == list(tiny_base().state_dict())
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        peft.set_base_model_state_dict(model, tiny_base(seed=5).state_dict())
        assert torch.equal(logits(model.unload()), logits(tiny_base(seed=5)))


@cases
@pytest.mark.parametrize("safe", [False, True])
def test_merged_in_place_and_back(targets: list[str], options: dict[str, Any], safe: bool) -> None:
    plain, model = tiny_lora(targets=targets), sparse_model(targets=targets, **options)
    for one in (plain, model):
        torch.manual_seed(3)
        one.add_adapter("late", one.peft_config["default"])
        one.set_adapter("default")
        one.merge_adapter(safe_merge=safe)
    same_state(plain.get_base_model(), model.get_base_model())
    assert torch.allclose(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    assert find_state(model) is not None
    for one in (plain, model):
        one.unmerge_adapter()
    same_state(plain.get_base_model(), model.get_base_model())
    assert_identical(outputs(plain.train()), outputs(remove_sparselora(model.train())))


@pytest.mark.parametrize("method", ["merge_and_unload", "unload", "merge_adapter", "save_pretrained"])
def test_a_refusal_changes_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model()
    before, modules = outputs(model), list(model.modules())
    last = model.get_base_model().model.layers[2].mlp.down_proj.base_layer
    with monkeypatch.context() as patch:
        patch.setattr(last, "codec", NF4Codec())
        call = getattr(model.get_base_model() if method == "save_pretrained" else model, method)
        with pytest.raises(ValueError, match=r"stored as nf4: .*sparselora-dist merge"):
            call(tmp_path) if method == "save_pretrained" else call()
    assert list(model.modules()) == modules
    assert not any(getattr(module, "merged", False) for module in model.modules())
    model.save_pretrained(tmp_path / "adapter")
    assert len(peft.load_peft_weights(tmp_path / "adapter")) == 3 * 7 * 2
    assert_identical(before, outputs(model))


def test_a_copy_is_merged_alone() -> None:
    model = sparse_model()
    before = outputs(model)
    same_state(tiny_lora(targets=ALL_LINEAR).merge_and_unload(), copy.deepcopy(model).merge_and_unload())
    assert_identical(before, outputs(model))


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
def test_an_adapter_that_came_after_apply_is_merged(safe: bool) -> None:
    """On a bare model that is sparse, by PEFT's own merge: also into what is stored turned (o and down)."""
    lora = peft.LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
    base = tiny_base()
    base.requires_grad_(False)
    expected, model = copy.deepcopy(base), apply_sparselora(base, config())
    states = []
    for one in (expected, model):
        torch.manual_seed(3)
        merged = peft.get_peft_model(one, lora).merge_and_unload(safe_merge=safe)
        states.append(merged.state_dict())
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-6, msg=name)
