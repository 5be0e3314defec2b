"""Applying and removing: in place, for one instance, without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from sparselora_dist import apply_sparselora, remove_sparselora, selection, set_step
from sparselora_dist.apply import find_state
from support.applied import anatomy, assert_identical, config, families, outputs, sparse_model
from support.compare import assert_close
from support.models import ALL_LINEAR, ATTENTION, batch, tiny_base, tiny_lora


@families
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR], ids=["lora-attention", "lora-all"])
def test_remove_gives_back_the_model(family: str, targets: list[str]) -> None:
    model = tiny_lora(family, targets)
    before, parts = outputs(model), anatomy(model)
    apply_sparselora(model, config())
    assert not torch.equal(outputs(model)[0], before[0])
    assert anatomy(model)["modules"] != parts["modules"]
    assert remove_sparselora(model) is model
    assert_identical(before, outputs(model))
    assert anatomy(model) == parts
    assert find_state(model) is None


def test_remove_keeps_what_was_trained_and_the_mode() -> None:
    model = sparse_model()
    outputs(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.sub_(0.1 * p.grad)
    model.eval()
    expected = model(**batch()).logits
    remove_sparselora(model)
    assert not any(module.training for module in model.modules())
    assert torch.allclose(model(**batch()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_apply_again_after_remove(inside: bool) -> None:
    model = sparse_model()
    first = outputs(model)
    remove_sparselora(model.get_base_model() if inside else model)
    assert find_state(model) is None
    assert_identical(first, outputs(apply_sparselora(model, config())))


def test_remove_keeps_adapters_that_came_later() -> None:
    """In sparse FFNs and projections that had none, beside one that had."""

    def add(model: PeftModel) -> PeftModel:
        torch.manual_seed(3)
        model.add_adapter("late", LoraConfig(r=2, target_modules=ALL_LINEAR, init_lora_weights=False))
        model.set_adapter("late")
        return model

    plain = add(tiny_lora(targets=["q_proj"]))
    model = add(sparse_model(targets=["q_proj"]))
    remove_sparselora(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_identical(outputs(plain), outputs(model))
    model.delete_adapter("late")
    model.set_adapter("default")
    assert_identical(outputs(tiny_lora(targets=["q_proj"])), outputs(model))


def test_remove_without_apply() -> None:
    for call in (remove_sparselora, selection, lambda model: set_step(model, 0, 1)):
        with pytest.raises(ValueError, match="call apply_sparselora"):
            call(tiny_lora())


def test_only_this_instance_changes() -> None:
    model, other = tiny_lora(targets=ALL_LINEAR), tiny_lora(targets=ALL_LINEAR)
    expected, parts = outputs(other), anatomy(other)
    classes = {type(module) for module in model.modules()} | {nn.Module, nn.Linear}
    attributes = {cls: dict(vars(cls)) for cls in classes}
    apply_sparselora(model, config())
    outputs(model)
    assert_identical(expected, outputs(other))
    assert anatomy(other) == parts
    assert {cls: dict(vars(cls)) for cls in classes} == attributes


def test_a_deep_copy_is_independent() -> None:
    model = sparse_model()
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert_identical(expected, outputs(twin))
    outputs(twin, batch(seed=7))
    assert selection(twin)[0]["ffn"].tolist() != selection(model)[0]["ffn"].tolist()
    remove_sparselora(twin)
    assert_identical(expected, outputs(model))
    assert find_state(twin) is None and find_state(model) is not None


def test_a_causal_lm_without_adapters_is_accepted() -> None:
    model = tiny_base().requires_grad_(False).train()
    expected = model(**batch()).logits
    apply_sparselora(model, config(skip_unused_logits=False))
    assert not torch.equal(model(**batch()).logits, expected)
    assert sorted(selection(model)) == [0, 1, 2]
    remove_sparselora(model)
    assert torch.equal(model(**batch()).logits, expected)


def test_disabled_replaces_no_module() -> None:
    model = tiny_lora(targets=ALL_LINEAR)
    (logits, grads), modules = outputs(model), anatomy(model)["modules"]
    apply_sparselora(model, config(enabled=False, skip_unused_logits=False))
    assert anatomy(model)["modules"] == modules
    got = outputs(model)
    assert_close("logits", logits, got[0])
    for name, grad in grads.items():
        assert_close(name, grad, got[1][name], atol=2e-6 * grad.abs().max())
    assert selection(model) == {}
    remove_sparselora(model)
