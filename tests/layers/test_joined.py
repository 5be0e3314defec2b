"""q, k and v of a layer are computed together where they carry the same kind of adapter, and apart everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.layers import joined
from support.compare import assert_close
from support.models import ALL_LINEAR, FAMILIES, batch, gradients, tiny_lora

LAYERS = 3
SPARSE = {group: {"0-2": 0.5} for group in ("qk", "vo")}
Runs = list[Any]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The results of every joined operation."""
    seen: Runs = []
    original = joined.lora_joined

    def call(*args: Any, **options: Any) -> Any:
        seen.append(original(*args, **options))
        return seen[-1]

    monkeypatch.setattr(joined, "lora_joined", call)
    return seen


def make(change: Callable[[PeftModel], Any] = lambda model: None, **options: Any) -> PeftModel:
    model = tiny_lora(targets=ALL_LINEAR, family=options.pop("family", "llama"))
    change(model)
    settings = {"skip_unused_logits": False, **(options or {"enabled": False})}
    return apply_sparselora(model, SparseLoRAConfig.from_dict(settings))


def check(expected: PeftModel, got: PeftModel) -> None:
    outs = [model(**batch()) for model in (expected, got)]
    for out in outs:
        out.loss.backward()
    assert_close("logits", outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-5)
    reference, mine = gradients(expected), gradients(got)
    assert reference and reference.keys() == mine.keys()
    for name, gradient in reference.items():
        assert_close(name, gradient, mine[name], rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_lora(family: str, runs: Runs) -> None:
    check(tiny_lora(family, ALL_LINEAR), make(family=family))
    assert len(runs) == LAYERS


def test_sparse_layers_and_evaluation_too(runs: Runs) -> None:
    model = make(layers=SPARSE)
    model(**batch()).loss.backward()
    model.eval()(**batch())
    assert len(runs) == 2 * LAYERS


def test_the_last_layer_asks_q_for_fewer_positions(runs: Runs) -> None:
    make(layers=SPARSE, skip_unused_logits=True)(**batch()).loss.backward()
    assert len(runs) == LAYERS - 1


def dropout(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if name.endswith("k_proj.lora_dropout"):
            module["default"] = nn.Dropout(0.1)


def freeze(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "v_proj.lora_A" in name:
            parameter.requires_grad_(False)


def hook(model: PeftModel) -> None:
    for layer in model.get_base_model().model.layers:
        layer.self_attn.k_proj.base_layer.register_forward_hook(lambda *_: None)


def second_adapter(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize("change", [dropout, freeze, hook, second_adapter])
def test_whatever_is_unlike_goes_apart(change: Callable[[PeftModel], Any], runs: Runs) -> None:
    model = make(change)
    if change is not dropout:
        plain = tiny_lora(targets=ALL_LINEAR)
        change(plain)
        torch.manual_seed(1)
        trained = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data.copy_(trained[name].data)
        check(plain, model)
    else:
        model(**batch()).loss.backward()
    assert not runs


def test_another_input_goes_apart_and_nothing_is_left_over(runs: Runs) -> None:
    """Each call gets the product with what it was called with, in any order."""
    model = make()
    attention = model.get_base_model().model.layers[1].self_attn
    first, second = torch.randn(1, 5, 48), torch.randn(1, 5, 48)
    expected = {
        name: [getattr(attention, name)(x.clone()) for x in (first, second)] for name in ("q_proj", "k_proj", "v_proj")
    }
    runs.clear()
    q = attention.q_proj(first)
    torch.testing.assert_close(attention.k_proj(second), expected["k_proj"][1])
    torch.testing.assert_close(attention.v_proj(first), expected["v_proj"][0])
    torch.testing.assert_close(q, expected["q_proj"][0])
    torch.testing.assert_close(attention.v_proj(first), expected["v_proj"][0])
    assert len(runs) == 1
