"""Vision-language models: the text decoder is sparse, image tokens are context, the vision tower is left alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.config import ModelSection
from sparselora_dist.io.load import check_model
from sparselora_dist.layouts import UnsupportedModelError, decoder_layers
from sparselora_dist.layouts.described import described
from support.models import ALL_LINEAR
from support.oracle import train_step
from support.vision_language import IMAGE, TYPES, batch, tiny_model

from .test_every_type import assert_same, drop

GROUPS = ("ffn", "qk", "vo")


def lora(model_type: str) -> PeftModel:
    """By bare names, as people write them: some are in the vision tower, too."""
    torch.manual_seed(1)
    # Gemma 4's tower wraps its linears, which PEFT does not take.
    wrapped = r".*vision_tower.*" if model_type == "gemma4" else None
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, exclude_modules=wrapped, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(model_type), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def config(sparsity: float) -> SparseLoRAConfig:
    return SparseLoRAConfig.from_dict({"layers": {group: {"auto": sparsity} for group in GROUPS}, "rank": 4})


def outside(model: PeftModel) -> dict[str, int]:
    """Every module that is not the text decoder's."""
    own = [layer.path for layer in decoder_layers(model)]
    named = model.get_base_model().named_modules()
    return {name: id(module) for name, module in named if not any(name.startswith(path) for path in own)}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_text_decoder(model_type: str) -> None:
    """Sparse is dense with the dropped channels at zero; sparsity 0 is plain PEFT; removal leaves no trace."""
    model, data = lora(model_type), batch(model_type)
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    before = train_step(copy.deepcopy(model), data)
    others = train_step(copy.deepcopy(model), data | {"pixel_values": -data["pixel_values"]})
    assert others.loss != before.loss, "the images are not read"

    apply_sparselora(again, config(0.0))
    assert_same(before, train_step(again, data))

    modules = outside(model)
    apply_sparselora(model, config(0.6))
    assert outside(model) == modules
    got, masks = train_step(model, data), selection(model)
    partition = find_state(model).context.last.partition
    images = (data["input_ids"] == IMAGE).flatten().nonzero().flatten()
    assert torch.isin(images, partition.context).all() and len(images) == 12
    layers = decoder_layers(plain)
    expected = {g: [layer.index for layer in layers if g not in layer.missing] for g in GROUPS}
    assert layers[-1].trims and expected["ffn"] == [0, 1, 2]
    expected["ffn"].pop()  # The last layer's FFN runs where the loss reads it: at no context token.
    assert {g: [i for i in sorted(masks) if g in masks[i]] for g in GROUPS} == expected
    assert got.logits.shape[:2] == (1, int((data["labels"][:, 1:] != -100).sum()))
    assert_same(train_step(drop(plain, masks, data), data), got)

    remove_sparselora(model)
    after = train_step(model, data)
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.gradients[name], after.gradients[name]) for name in before.gradients)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma4"])
def test_recomputed_layers(model_type: str) -> None:
    """Where the tower's features are added between layers, or each layer has embeddings of its own, too."""
    model, data = apply_sparselora(lora(model_type), config(0.6)), batch(model_type)
    expected, masks = train_step(model, data), selection(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(expected, train_step(model, data))
    again = selection(model)
    assert all(torch.equal(masks[layer][group], again[layer][group]) for layer in masks for group in masks[layer])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_pair_is_turned_by_one_angle_of_the_three(model_type: str) -> None:
    """Time, height and width turn other pairs; zero some pairs and rotate, or rotate and zero them: the same."""
    model = tiny_model(model_type)
    attention = decoder_layers(model)[0].attention
    assert attention is not None and attention.heads.pairs is None
    positions = torch.tensor([[[0, 1, 2, 3, 4]], [[0, 3, 3, 5, 5]], [[0, 2, 4, 1, 6]]])
    angles = model.model.language_model.rotary_emb(torch.zeros(1, 5, 64), positions)
    rotate = sys.modules[type(attention.module).__module__].apply_rotary_pos_emb
    kept = torch.zeros(attention.heads.kv_heads * 16)
    kept[attention.heads.k_rows(torch.tensor([0, 3, 9, 14]))] = 1
    mask = kept.view(1, attention.heads.kv_heads, 1, 16)
    k = torch.randn(1, attention.heads.kv_heads, 5, 16)
    rotated = rotate(k, k, *angles)[1]
    torch.testing.assert_close(rotate(k * mask, k * mask, *angles)[1], rotated * mask)
    flat = model.model.language_model.rotary_emb(torch.zeros(1, 5, 64), positions[:1].expand(3, -1, -1))
    assert not torch.equal(rotate(k, k, *flat)[1], rotated)


def test_a_run_has_no_images(tmp_path: Path) -> None:
    """It is refused by its config, and so is its plan."""
    config = tiny_model("qwen2_5_vl").config
    config.save_pretrained(tmp_path)
    match = r"'qwen2_5_vl'\) reads more than text.*apply_sparselora in a Trainer"
    with pytest.raises(UnsupportedModelError, match=match):
        check_model(ModelSection(name_or_path=str(tmp_path)))
    with pytest.raises(UnsupportedModelError, match=match):
        described(config.to_dict(), "config.json")
