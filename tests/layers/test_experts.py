"""Routed experts, sparse, with adapters on their parameters: equal to the dense ones with the dropped channels at zero."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layers.experts import SparseExperts
from sparselora_dist.layouts import UnsupportedModelError, decoder_layers
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.sync.masks import MaskSync
from support.compare import assert_close
from support.every_type import rows, tiny_model
from support.mixtures import PARAMETERS, NarrowExperts, mixture
from support.models import batch, gradients
from support.oracle import assert_same, context_tokens, train_step
from support.waits import Waits

families = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])


def config(sparsity: float = 0.6, layers: str = "1-3", **options: Any) -> SparseLoRAConfig:
    return SparseLoRAConfig.from_dict({"layers": {"experts": {layers: sparsity}}, "rank": 4, **options})


def drop(model: Any, masks: dict[int, dict[str, Tensor]], data: dict[str, Tensor], lora_branch: str) -> Any:
    context, _ = context_tokens(data)
    layers = decoder_layers(model)
    for index, chosen in masks.items():
        experts: Any = layers[index].experts
        experts.module.forward = NarrowExperts(experts, chosen["experts"], context, lora_branch)
    return model


@families
@pytest.mark.parametrize("lora_branch", ["kept", "dense"])
def test_sparse_is_dense_with_dropped_channels(family: str, lora_branch: str) -> None:
    # With the loss of the router, which reads every layer's logits.
    model, data = mixture(family, output_router_logits=True), batch()
    plain = copy.deepcopy(model)
    apply_sparselora(model, config(lora_branch=lora_branch))
    got, masks = train_step(model, data), selection(model)
    assert sorted(masks) == [1, 2, 3]
    experts = decoder_layers(model)[1].experts
    assert experts is not None
    kept = masks[1]["experts"].view(experts.count, -1)
    assert kept.shape[1] == -(-experts.width * 2 // 5)
    assert all(set((row // experts.width).tolist()) == {expert} for expert, row in enumerate(kept))
    assert_same(train_step(drop(plain, masks, data, lora_branch), data), got, data, rtol=1e-3, atol=2e-5)


@families
def test_without_sparsity_it_is_peft_and_removal_leaves_no_trace(family: str) -> None:
    model, data = mixture(family), batch()
    before, state = train_step(copy.deepcopy(model), data), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    apply_sparselora(model, config(0.0))
    assert torch.equal(random, torch.get_rng_state())
    assert_same(before, train_step(model, data), data, rtol=1e-3, atol=2e-5)
    remove_sparselora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in mixture(family).modules()]
    assert sorted(state) == sorted(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    after = train_step(model, data)
    assert all(torch.equal(before.gradients[name], after.gradients[name]) for name in before.gradients)


def test_channels_are_those_of_the_largest_weighted_values() -> None:
    """By factors that are exact: Σ (w · act(gate) · up)² over an expert's context tokens; none: the first channels."""
    model, data = mixture(targets=["q_proj"], parameters=[]), rows()
    layers = decoder_layers(model)
    seen: dict[int, tuple] = {}
    handles = [
        layer.experts.module.register_forward_pre_hook(lambda m, args, i=layer.index: seen.update({i: args}))  # type: ignore[union-attr]
        for layer in layers
    ]
    context = context_tokens(data)[0].flatten()
    copied = copy.deepcopy(model)
    apply_sparselora(copied, config(0.75, "0", rank=32))
    model(**data)
    for handle in handles:
        handle.remove()
    x, chosen, weights = seen[0]
    bank: Any = layers[0].experts
    scores = torch.zeros(bank.count, bank.width)
    for token in context.nonzero().flatten().tolist():
        for expert, weight in zip(chosen[token].tolist(), weights[token]):
            gate, up = linear(x[token], bank.module.gate_up_proj[expert]).chunk(2)
            scores[expert] += (weight * silu(gate) * up) ** 2
    copied(**data)
    got = selection(copied)[0]["experts"].view(bank.count, -1) % bank.width
    assert torch.equal(got, scores.topk(bank.width // 4).indices.sort(1).values)
    # All experts see some of these tokens. Where one sees none:
    sparse = next(m for m in copied.modules() if isinstance(m, SparseExperts))
    copied(**{name: value[:1, :11] for name, value in data.items()})
    few = sparse.context.last.masks[0, "experts"].view(bank.count, -1)  # type: ignore[union-attr]
    routed = set(seen[0][1][:9].flatten().tolist())
    for expert in set(range(bank.count)) - routed:
        assert (few[expert] - expert * bank.width).tolist() == list(range(bank.width // 4))


@families
@pytest.mark.parametrize("method", ["merge", "unload"])
def test_unloaded_it_is_plain_pefts_model(family: str, method: str, tmp_path: Path) -> None:
    def unloaded(model: Any) -> Any:
        return model.unload() if method == "unload" else model.merge_and_unload(safe_merge=True)

    expected, model = unloaded(mixture(family)), mixture(family)
    apply_sparselora(model, config())
    base, plain = model.get_base_model().state_dict(), mixture(family).get_base_model().state_dict()
    assert sorted(base) == sorted(plain) and all(torch.equal(base[name], plain[name]) for name in plain)
    got = unloaded(model)
    one, other = expected.state_dict(), got.state_dict()
    assert sorted(one) == sorted(other) and all(torch.equal(one[name], other[name]) for name in one)
    got.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], one[name]) for name in one)


def test_merged_where_the_weights_are_it_stays_sparse() -> None:
    model, data = mixture(), batch()
    apply_sparselora(model, config())
    before = train_step(model, data).loss
    experts = next(m for m in model.modules() if isinstance(m, SparseExperts))
    rows = experts.gate_up_proj.rows.clone()
    model.merge_adapter()
    assert not torch.equal(rows, experts.gate_up_proj.rows)
    assert_close("loss", before, model(**data).loss.detach(), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_close("rows", rows, experts.gate_up_proj.rows, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.equal(before, model(**data).loss)
    other = mixture()
    torch.nn.init.ones_(other.get_base_model().model.layers[1].mlp.experts.base_layer.base_layer.down_proj)
    model.get_base_model().load_state_dict(other.get_base_model().state_dict())
    assert bool((experts.down_proj.rows == 1).all())


def test_as_one_launch_it_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host never learns how many tokens an expert has. Tried on a CPU, in bf16, as a GPU would compute."""
    inputs, found = batch(), []
    grouped, scores = (importlib.import_module(f"sparselora_kernels.{name}") for name in ("grouped", "expert_score"))
    for launched in (False, True):
        model = apply_sparselora(mixture().bfloat16(), config())
        if launched:
            for module in (grouped, scores):
                monkeypatch.setattr(module, "one_launch", lambda x: True)
            monkeypatch.setattr(MaskSync, "check", lambda self: self._pending.clear())
        partition = partition_tokens(inputs["labels"], inputs["attention_mask"])
        find_state(model).context.hand_over(inputs["labels"], partition)  # type: ignore[union-attr]
        with Waits() as waits:
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        assert bool(waits.ours) is not launched, waits.ours
        found.append((loss.detach(), gradients(model)))
    (one, expected), (other, got) = found
    assert_close("loss", one, other)
    for name, gradient in expected.items():
        assert_close(name, gradient, got[name], rtol=0.1, atol=0.05 * float(gradient.abs().max()))


def test_checkpointed_copied_and_compiled_it_is_the_same() -> None:
    def made() -> Any:
        return copy.deepcopy(apply_sparselora(mixture(layers=1, use_cache=False), config(layers="0")))

    data, again = batch(), made()
    expected = train_step(apply_sparselora(mixture(layers=1), config(layers="0")), data)
    again.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(expected, train_step(again, data), data)
    got = train_step(torch.compile(made(), backend="aot_eager"), data)
    names = {name.removeprefix("_orig_mod."): grad for name, grad in got.gradients.items()}
    for name, grad in expected.gradients.items():
        assert_close(name, grad, names[name], rtol=1e-3, atol=1e-5)


def test_refusals() -> None:
    model = mixture("gpt_oss", ["mlp.experts.gate_up_proj_bias"])
    with pytest.raises(
        UnsupportedModelError, match=r"layers.1.mlp.experts .*'gate_up_proj_bias' \(target_parameters\)"
    ):
        apply_sparselora(model, config())
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": {"vo": {"1": 0.5}}}))  # Its experts stay PEFT's.
    trainable = mixture()
    trainable.get_base_model().model.layers[2].mlp.experts.base_layer.base_layer.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\.down_proj is trainable"):
        apply_sparselora(trainable, config())
    with pytest.raises(
        UnsupportedModelError, match=r"names layer 0, but it has no routed experts. Layers that can: 1, 2, 3"
    ):
        apply_sparselora(mixture("deepseek_v3", targets=["o_proj"]), config(layers="0-3"))
    listed = tiny_model("qwen3_moe").requires_grad_(False)
    listed.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(UnsupportedModelError, match=r"its mlp\.experts is a ModuleList of 3 Linear"):
        apply_sparselora(listed, config(layers="0"))
    other = tiny_model("qwen3_moe").requires_grad_(False)
    experts: Any = other.model.layers[1].mlp.experts
    type(experts).odd = lambda self, x, chosen, weights: 2 * x
    experts.__class__ = type("OddExperts", (type(experts),), {"forward": type(experts).odd})
    with pytest.raises(UnsupportedModelError, match="a OddExperts, computes something else"):
        apply_sparselora(other, config())


def test_what_drops_tokens_before_its_experts_is_refused() -> None:
    model, data = mixture(), batch()
    apply_sparselora(model, config())
    experts = next(m for m in model.modules() if isinstance(m, SparseExperts))
    forward = experts.forward
    experts.forward = lambda x, chosen, weights: forward(x[1:], chosen[1:], weights[1:])  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="layer 1: the experts were given 95 tokens, where the forward has 96"):
        model(**data)


def test_an_empty_slot_of_the_router_counts_for_nothing() -> None:
    model = apply_sparselora(mixture(), config())
    experts = next(m for m in model.modules() if isinstance(m, SparseExperts))
    x, weights = torch.randn(5, experts.layout.hidden), torch.rand(5, 2)
    chosen = torch.tensor([[0, 1]]).expand(5, 2)
    expected = experts(x, chosen, weights * torch.tensor([1.0, 0.0]))
    assert torch.allclose(expected, experts(x, torch.tensor([[0, experts.layout.count]]).expand(5, 2), weights))


def test_on_the_meta_device() -> None:
    model = mixture()
    apply_sparselora(model, config())
    names = {name: p.shape for name, p in model.named_parameters()}
    empty = mixture().to("meta")
    with pytest.raises(ValueError, match=r"layers.1.experts.gate_proj is on the meta device"):
        apply_sparselora(empty, config())

    apply_sparselora(empty, config(), weights=ModelWeights(mixture()))
    assert {name: p.shape for name, p in empty.named_parameters()} == names
    stored = [p for name, p in empty.named_parameters() if name.endswith("rows")]
    assert len(stored) == 6 and all(p.is_meta for p in stored)


def test_adapters_that_come_later_are_refused() -> None:
    """PEFT finds no parameter there any more, and would leave the experts out without a word."""
    model = apply_sparselora(mixture(), config())
    late = LoraConfig(target_modules=["q_proj"], target_parameters=PARAMETERS)
    with pytest.raises(ValueError, match=r"'late' is on mlp.experts.gate_up_proj .*add it before apply_sparselora"):
        model.add_adapter("late", late)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"]))
    remove_sparselora(model)
    model.add_adapter("later", late)
