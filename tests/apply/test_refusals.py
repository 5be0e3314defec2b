"""What is refused, by name, with the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BlipConfig,
    BlipForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from sparselora_dist import apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.layouts import UnsupportedModelError
from support.applied import assert_identical, config, outputs, refuse, sparse_model
from support.compare import assert_close
from support.models import ALL_LINEAR, FAMILIES, batch, gradients, tiny_base, tiny_config, tiny_lora


def test_layers_in_which_nothing_is_known() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    match = r"'gpt2'\) is not supported: transformer.h.0 .*ffn: .*mlp \(GPT2MLP\).*qk: its attn.* has no linear q_proj"
    refuse(model, match, UnsupportedModelError)


@pytest.mark.parametrize("options", [{}, {"enabled": False}])
def test_an_encoder_with_its_decoder(options: dict[str, bool]) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    match = r"'t5'\) is an encoder and a decoder"
    refuse(T5ForConditionalGeneration(config), match, UnsupportedModelError, **options)
    lora = LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    refuse(get_peft_model(T5ForConditionalGeneration(config), lora), match, UnsupportedModelError, **options)


def test_images_whose_decoder_is_of_another_kind() -> None:
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**small, "vocab_size": 32}, vision_config={**small, "image_size": 28, "patch_size": 14}
    )
    refuse(BlipForConditionalGeneration(config), "BlipForConditionalGeneration has no decoder", UnsupportedModelError)


class Scaled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def change_layout(model: PeftModel, how: str) -> None:
    layer = model.get_base_model().model.layers[1]
    if how == "fused":
        layer.self_attn.qkv_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    elif how == "type":
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    elif how == "shape":
        layer.mlp.down_proj = nn.Linear(100, 48, bias=False)
    elif how == "formula":
        layer.mlp.__class__ = Scaled
    else:
        del layer.mlp


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            "fused",
            "its self_attn, a LlamaAttention, has one matrix qkv_proj, and where q, k and v are in it is not known",
        ),
        ("type", r"it has no FFN with gate_proj, up_proj, down_proj, but .*mlp \(LlamaMLP\)"),
        (
            "shape",
            r"its mlp, a LlamaMLP, has matrices gate_proj, up_proj, down_proj of \(104, 48\), \(104, 48\), \(48, 100\)",
        ),
        ("formula", r"its mlp, a Scaled, computes something else than down\(act\(gate\(x\)\) \* up\(x\)\)"),
        ("mlp", "it has no FFN with gate_proj, up_proj, down_proj"),
    ],
)
def test_changed_layout(how: str, match: str) -> None:
    """The layer and the reason, and which layers can."""
    model = tiny_lora(targets=["v_proj"])
    change_layout(model, how)
    group = "qk" if how == "fused" else "ffn"
    where = rf"sparse_lora\.layers\.{group} names layer 1, but {match}.*Layers that can: 0, 2"
    refuse(model, where, UnsupportedModelError, layers={group: {"0-2": 0.5}})


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_trainable_base(part: str) -> None:
    model = tiny_lora("qwen2")
    linear = model.get_base_model().model.layers[2].self_attn.k_proj.base_layer
    getattr(linear, part).requires_grad_()
    refuse(model, "layers.2.k_proj is trainable")


class Elsewhere(nn.Parameter):
    """Says that it is on a GPU."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


def test_weights_on_several_devices() -> None:
    model = tiny_lora()
    norm = model.get_base_model().model.layers[2].input_layernorm
    norm.weight = Elsewhere(norm.weight.detach(), requires_grad=False)
    refuse(model, r"several devices \(cpu, cuda:1\).*device_map.*FSDP2 or ZeRO-3")
    norm.weight = nn.Parameter(norm.weight.detach().to("meta"), requires_grad=False)
    apply_sparselora(model, config(layers={"ffn": {"0": 0.5}}))


def test_weights_that_are_not_there() -> None:
    model = tiny_lora()
    up = model.get_base_model().model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to("meta"), requires_grad=False)
    refuse(model, r"layers\.1\.up_proj is on the meta device.*cpu_ram_efficient_loading")


def test_a_replica_of_data_parallel() -> None:
    model = sparse_model()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"DataParallel is not supported.*torchrun or accelerate launch"):
        replica(**batch())
    assert not find_state(model).context.in_forward


TARGETS = {"target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
INSIDE = {
    "DoRA": (LoraConfig(use_dora=True, **TARGETS), r"layers\.1\.v_proj uses a LoRA variant \(DoRA\)"),
    "aLoRA": (
        LoraConfig(alora_invocation_tokens=[3], **TARGETS),
        r"layers\.1\.v_proj uses a LoRA variant \(ALoraLinear\)",
    ),
    "AdaLoRA": (
        AdaLoraConfig(total_step=9, **TARGETS),
        r"layers\.1\.v_proj carries a SVDLinear of peft\.tuners\.adalora",
    ),
    "RandLoRA": (RandLoraConfig(r=4, **TARGETS), r"layers\.1\.v_proj carries a Linear of peft\.tuners\.randlora"),
    "VeRA": (VeraConfig(r=4, **TARGETS), r"v_proj carries a Linear of peft\.tuners\.vera"),
    "LoHa": (LoHaConfig(r=4, **TARGETS), r"v_proj carries a Linear of peft\.tuners\.loha"),
    "IA3": (IA3Config(feedforward_modules=[], **TARGETS), r"v_proj carries a Linear of peft\.tuners\.ia3"),
    "whole": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"], task_type="CAUSAL_LM"),
        r"v_proj is trained whole \(ModulesToSaveWrapper\)",
    ),
    "parameters": (
        LoraConfig(target_modules=[], target_parameters=["self_attn.v_proj.weight"], task_type="CAUSAL_LM"),
        r"layers\.1\.v_proj carries a ParamWrapper \(target_parameters\)",
    ),
}


@pytest.mark.parametrize("method", INSIDE)
def test_another_method_than_plain_lora(method: str) -> None:
    """Inside a sparse module; where nothing is sparse it is the family's and PEFT's."""
    settings, match = INSIDE[method]
    model = get_peft_model(tiny_base(), settings).train()
    refuse(model, f"{match}.*plain LoRA is supported in sparse layers", layers={"ffn": {"0-1": 0.5}, "vo": {"1": 0.5}})
    whole = loss_and_gradients(model)
    apply_sparselora(model, config(layers={"ffn": {"0-1": 0.0}}))
    for name, expected, got in compared(whole, loss_and_gradients(model)):
        assert_close(name, expected, got, rtol=1e-4, atol=1e-6)


def loss_and_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def compared(
    expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    assert expected.keys() == got.keys() and len(expected) > 1
    return [(name, expected[name], got[name]) for name in expected]


@pytest.mark.parametrize("options", [{}, {"enabled": False}])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_tokens_that_are_not_the_batch_s(kind: type, options: dict[str, bool]) -> None:
    model = get_peft_model(tiny_base(), kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    refuse(model, "_TUNING puts tokens of its own before the batch's.*plain LoRA", **options)


@pytest.mark.parametrize("options", [{}, {"enabled": False}])
def test_x_lora(options: dict[str, bool], tmp_path: Path) -> None:
    get_peft_model(tiny_base(), LoraConfig(**TARGETS)).save_pretrained(tmp_path)
    settings = XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, adapters={"0": str(tmp_path)})
    model = get_peft_model(tiny_base(use_cache=False), settings)
    refuse(model, "X-LoRA runs the model twice.*one by one", **options)


def test_twice() -> None:
    refuse(sparse_model(), "already called")
    refuse(sparse_model().get_base_model(), "already called")


@pytest.mark.parametrize("ranges", ["3", "1-5", "20-30"])
def test_a_range_that_the_model_does_not_have(ranges: str) -> None:
    refuse(tiny_lora(), rf"sparse_lora.layers.ffn.*{ranges}", layers={"ffn": {ranges: 0.5}})


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier(family: str, kind: type) -> None:
    """A reward model, too: its labels are no tokens'."""
    model = kind.from_config(tiny_config(family))
    lora = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    for options in ({}, {"skip_unused_logits": False}, {"enabled": False}):
        refuse(get_peft_model(model, lora), r"Classification has no language model head.*plain PEFT", **options)
        model = kind.from_config(tiny_config(family))
        refuse(model.requires_grad_(False), "AutoModelForCausalLM", UnsupportedModelError, **options)


@pytest.mark.parametrize("where", ["an activation", "the LM head", "the last step"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora(targets=ALL_LINEAR)
    before = outputs(model)
    if where == "an activation":
        model.get_base_model().model.layers[2].mlp.act_fn = nn.Softplus()
        refuse(model, r"layer 2, but its mlp, a LlamaMLP, has the activation Softplus.*known: silu, gelu")
        model.get_base_model().model.layers[2].mlp.act_fn = nn.SiLU()
    else:
        name = "pack_logits" if where == "the LM head" else "merge_as_the_family"

        def fail(*_: object) -> None:
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(f"sparselora_dist.apply.model.{name}", fail)
            refuse(model, "no room", MemoryError)
    assert_identical(before, outputs(model))
    apply_sparselora(model, config())
