"""Base and LoRA branch in one operation: where it is used, and where PEFT's own forward is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import sparselora_dist.layers.lora as lora
from sparselora_dist import SparseLoRAConfig, apply_sparselora
from support.compare import assert_close
from support.models import ALL_LINEAR, batch, gradients, tiny_base, tiny_lora

SPARSE = {"layers": {"ffn": {"1": 0.5}, "qk": {"1": 0.5}, "vo": {"1": 0.5}}}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that base and branch were one operation."""
    calls: list[Any] = []
    together = lora._together

    def counted(base: nn.Module, *args: Any) -> bool:
        found = together(base, *args)
        calls.extend([base] * found)
        return found

    monkeypatch.setattr(lora, "_together", counted)
    return calls


def dense(model: PeftModel) -> PeftModel:
    return apply_sparselora(model, SparseLoRAConfig.from_dict({"enabled": False, "skip_unused_logits": False}))


def check(expected: PeftModel, got: PeftModel) -> None:
    """Same logits and gradients."""
    outs = [model(**batch()) for model in (expected, got)]
    for out in outs:
        out.loss.backward()
    assert_close("logits", outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-5)
    reference, mine = gradients(expected), gradients(got)
    assert reference and reference.keys() == mine.keys()
    for name, gradient in reference.items():
        assert_close(name, gradient, mine[name], rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))


def test_every_matrix_of_plain_lora(fused: list[Any]) -> None:
    check(tiny_lora(targets=ALL_LINEAR), dense(tiny_lora(targets=ALL_LINEAR)))
    assert len(fused) == 3 * 7


def test_sparse_attention_too(fused: list[Any]) -> None:
    apply_sparselora(tiny_lora(targets=ALL_LINEAR), SparseLoRAConfig.from_dict(SPARSE))(**batch())
    # In the sparse FFN the branches belong to its own operations.
    assert len(fused) == 3 * 7 - 3


def test_dropout_goes_pefts_way(fused: list[Any]) -> None:
    model = dense(tiny_lora(targets=ALL_LINEAR))
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = nn.Dropout(0.1)
    model(**batch())
    assert not fused
    model.eval()(**batch())
    assert len(fused) == 3 * 7


def test_a_variant_added_later_goes_pefts_way(fused: list[Any]) -> None:
    model = dense(tiny_lora(targets=ALL_LINEAR))
    model.add_adapter("dora", LoraConfig(r=4, target_modules=ALL_LINEAR, use_dora=True))
    model.set_adapter("dora")
    model(**batch()).loss.backward()
    assert not fused
    magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
    assert magnitudes and all(p.grad is not None and p.grad.abs().sum() > 0 for p in magnitudes)


def test_a_variant_added_to_a_sparse_ffn_later_is_refused() -> None:
    model = apply_sparselora(tiny_lora(targets=ALL_LINEAR), SparseLoRAConfig.from_dict(SPARSE))
    model.add_adapter("dora", LoraConfig(r=4, target_modules=["up_proj"], use_dora=True))
    model.set_adapter("dora")
    with pytest.raises(ValueError, match="DoRA"):
        model(**batch())


def adalora() -> PeftModel:
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_base(), config)


def test_other_adapters_keep_their_own_forward(fused: list[Any]) -> None:
    dense(adalora())(**batch()).loss.backward()
    assert not fused
    with pytest.raises(ValueError, match=r"SVDLinear.*plain LoRA"):
        apply_sparselora(adalora(), SparseLoRAConfig.from_dict(SPARSE))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_a_hook_on_a_part_still_runs(part: str, fused: list[Any]) -> None:
    model, seen = tiny_lora(targets=ALL_LINEAR), []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    dense(model)(**batch())
    assert seen == [part] and len(fused) == 3 * 7 - 1


def test_a_frozen_adapter_keeps_no_input_and_gets_no_gradient() -> None:
    expected, got = tiny_lora(targets=ALL_LINEAR), dense(tiny_lora(targets=ALL_LINEAR))
    for model in (expected, got):
        for name, p in model.named_parameters():
            p.requires_grad_("layers.0.self_attn.q_proj.lora" in name)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = got(**batch()).loss
    loss.backward()
    mine = gradients(got)
    expected(**batch()).loss.backward()
    reference = gradients(expected)
    assert sorted(name for name, g in mine.items() if g is not None) == sorted(reference)
    for name, gradient in reference.items():
        assert_close(name, gradient, mine[name], rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))
    inputs = [t for t in kept if t.shape == (96, 48)]
    assert len(inputs) <= 1, "only the trained adapter needs its input"
