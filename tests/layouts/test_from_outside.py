"""A family with a known layout needs no line of code, and a layout of one's own one file: this one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.layouts import FFN, UnsupportedModelError, decoder_layers, register_ffn, unregister
from support.compare import assert_close
from support.models import tiny_config
from support.oracle import context_tokens, train_step


class ToyFFN(nn.Module):
    """As outsiders write one: strange names, and the activation inside."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.opens, self.carries, self.closes = (
            nn.Linear(hidden, width),
            nn.Linear(hidden, width),
            nn.Linear(width, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.closes(torch.nn.functional.gelu(self.opens(x)) * self.carries(x))


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    """A family that nobody has heard of; ``toy`` puts its FFN in the place of Llama's."""

    config_class = ToyConfig

    def __init__(self, config: Any, toy: bool) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if toy:
                del layer.mlp
                layer.block = ToyFFN(config.hidden_size, config.intermediate_size)
                layer.forward = _forward.__get__(layer)


def _forward(self: LlamaDecoderLayer, hidden_states: Tensor, **arguments: Any) -> Tensor:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
    hidden_states = hidden_states + attended
    return hidden_states + self.block(self.post_attention_layernorm(hidden_states))


def find_toy(layer: nn.Module) -> FFN | None:
    """The whole of what a layout from outside takes."""
    if not hasattr(layer, "block"):
        return None
    return FFN.gated("block", layer, ("opens", "carries", "closes"), torch.nn.functional.gelu)


@pytest.fixture
def registered() -> Iterator[None]:
    register_ffn(find_toy)
    yield
    unregister(find_toy)


def toy(own_ffn: bool) -> Any:
    torch.manual_seed(0)
    model = ToyForCausalLM(
        ToyConfig(**{k: v for k, v in tiny_config().to_dict().items() if k != "model_type"}), own_ffn
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    ffn = ["opens", "carries", "closes"] if own_ffn else ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", *ffn], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, lora).train()


def batch() -> dict[str, Tensor]:
    ids = torch.arange(36).view(2, 18) * 5 % 90 + 3
    labels = ids.masked_fill(torch.arange(18) < 10, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def check_sparse(model: Any) -> None:
    """Sparse is dense with the dropped neurons at zero; removed, it is what it was."""
    data, plain = batch(), copy.deepcopy(model)
    before = train_step(copy.deepcopy(model), data)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": {"ffn": {"0-1": 0.6}}, "rank": 4}))
    got, masks = train_step(model, data), selection(model)
    assert {layer: set(chosen) for layer, chosen in masks.items()} == {0: {"ffn"}, 1: {"ffn"}}
    context, _ = context_tokens(data)
    for index, chosen in masks.items():
        keep = torch.zeros(tiny_config().intermediate_size).index_fill_(0, chosen["ffn"], 1.0)
        mask = torch.where(context.flatten()[:, None], keep, torch.ones_like(keep)).view(2, 18, -1)
        down = decoder_layers(plain)[index].linear("down_proj")
        down.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask[:, : args[0].shape[1]],))
    expected = train_step(plain, data)
    assert_close("loss", expected.loss, got.loss, rtol=1e-5)
    for name, gradient in expected.gradients.items():
        assert_close(name, gradient, got.gradients[name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert not torch.equal(before.loss, got.loss)
    remove_sparselora(model)
    assert torch.equal(before.loss, train_step(model, data).loss)


def test_a_family_with_a_known_layout_needs_no_line() -> None:
    check_sparse(toy(own_ffn=False))


def test_a_layout_of_its_own_needs_one_file(registered: None) -> None:
    check_sparse(toy(own_ffn=True))


def test_without_that_file_it_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.ffn names layer 0, but it has no FFN.*block \(ToyFFN\)"):
        apply_sparselora(toy(own_ffn=True), SparseLoRAConfig.from_dict({"layers": {"ffn": {"0-1": 0.6}}}))
