"""The first module inside a layer that sees its input: by it a layer that is recomputed finds the masks of its first run."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.layouts import decoder_layers
from support.compare import assert_close
from support.every_type import rows, tiny_model
from support.oracle import train_step

ENTRIES = {
    "llama": "input_layernorm",
    "olmo2": "self_attn",  # Its norms come after.
    "opt": "self_attn_layer_norm",
    "nemotron_h": "norm",  # Cast to the norm's dtype first.
    "recurrent_gemma": "temporal_pre_norm",
}


@pytest.mark.parametrize("model_type", ENTRIES)
def test_recomputation_finds_the_masks(model_type: str) -> None:
    base = tiny_model(model_type)
    layers = decoder_layers(base)
    assert all(layer.entry is getattr(layer.module, ENTRIES[model_type]) for layer in layers)
    paths = [layer.path_of(name) for layer in layers for name in layer.names]
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=paths, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    groups = {
        group: {"auto": 0.6} for group in ("ffn", "qk", "vo") if any(group not in layer.missing for layer in layers)
    }
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": groups, "rank": 4}))
    again = [copy.deepcopy(model) for _ in range(2)]
    expected = train_step(model, rows())
    for reentrant, other in zip((False, True), again):
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        other.enable_input_require_grads()
        got = train_step(other, rows())
        assert_close("loss", expected.loss, got.loss, rtol=1e-6)
        for name, gradient in expected.gradients.items():
            scale = float(gradient.abs().max())
            assert_close(name, gradient, got.gradients[name], rtol=1e-4, atol=1e-5 * scale + 1e-9)
