"""What a run does beside the sparse layers is right for any family: streamed files, rows in a line, the loss in chunks.

Of each family a tiny model in a folder. Without sparsity a step of the run, packed and padded, is plain PEFT's on the model
that Transformers loads, in the loss and every gradient, and so is the evaluation; sparse, packed is padded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparselora_dist import selection
from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.apply.fit import fit_run
from sparselora_dist.config import ConfigError, RunConfig
from sparselora_dist.config.lora import LoraSection
from sparselora_dist.data import TokenDataset
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.sharding.placement import Placement
from sparselora_dist.train.evaluate import evaluate
from sparselora_dist.train.feed import Feed
from sparselora_dist.train.metrics import flop_model
from support.compare import assert_close
from support.engine_parts import make_engine
from support.every_type import VOCABULARY, tiny_config, tiny_model

# What is changed in the tiny config: switches that are off, or without effect, in so small a model.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {"sliding_window": 6, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6},
    "smollm3": {},
    "phi3": {},
    "starcoder2": {},
    "glm4": {},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 6},
    "deepseek_v3": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
PADDED = ("qwen3_next", "lfm2")
"""Layers that mix the tokens of a line beside attention."""
LENGTHS = (17, 9, 14)


def made(family: str, folder: Path) -> str:
    config = tiny_config(family)
    for name, value in FAMILIES[family].items():
        setattr(config, name, value)
    model = tiny_model(family, config)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.uniform_(0.1, 0.2)
    model.save_pretrained(folder)
    return str(folder)


def run_config(folder: str, sparsity: float) -> RunConfig:
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = decoder_layers(small)
    paths = [layer.path_of(name) for layer in layers for name in layer.names]
    groups = {group for layer in layers for group in ("ffn", "qk", "vo", "experts") if group not in layer.missing}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": folder, "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": paths},
            "sparse_lora": {"layers": {group: {"auto": sparsity} for group in groups}, "rank": 4},
            "data": {"train": "none.jsonl", "max_length": 24},
            "train": {"output_dir": folder, "per_device_train_batch_size": 3},
        }
    )


def dataset() -> TokenDataset:
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, VOCABULARY, sum(LENGTHS))
    mask = np.concatenate([np.arange(length) >= length // 2 + row for row, length in enumerate(LENGTHS)])
    return TokenDataset("rows", tokens, mask, np.cumsum([0, *LENGTHS]))


def with_adapters(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3, generator=generator)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    # A matrix whose positions nobody reads has zeros, or none.
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def stepped(config: RunConfig) -> tuple[Any, float, dict[str, Tensor], Any]:
    """A step of a run: model, loss, gradients, and the evaluation of the same rows."""
    model = with_adapters(build_model(config, Placement(torch.device("cpu")))[0])
    engine = make_engine(config)
    engine.prepare(model)
    state = find_state(model)
    assert flop_model(model, state).dense(1, 8) > 0
    state.context.chunk_loss = True
    feed = Feed(config, engine, dataset(), 0, 0.0)
    inputs = feed.inputs(range(len(LENGTHS)))
    state.context.hand_over(inputs.labels, inputs.partition)
    loss = model(**inputs.arguments, labels=inputs.labels, use_cache=False, num_items_in_batch=7).loss
    loss.backward()
    return model, loss.item(), gradients(model), evaluate(engine, state.context, feed, 3)


def plain(config: RunConfig) -> tuple[float, dict[str, Tensor], float]:
    """PEFT on what Transformers loads, row by row, with the family's own attention: loss, gradients, mean loss."""
    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, attn_implementation="eager", dtype="float32")
    model = with_adapters(get_peft_model(base, config.lora.build())).train()
    rows, total, count = dataset(), 0.0, 0
    for row in range(len(rows)):
        ids, mask = (torch.from_numpy(part.copy())[None] for part in rows[row])
        labels = ids.long().masked_fill(~mask, -100)
        loss = model(input_ids=ids.long(), labels=labels, use_cache=False, num_items_in_batch=7).loss
        loss.backward()
        total, count = total + loss.item(), count + int((labels[:, 1:] != -100).sum())
    return total, gradients(model), total * 7 / count


def assert_same(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert expected.keys() == got.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(name, gradient, got[name], rtol=1e-3, atol=1e-5 * max(largest, float(gradient.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_any_family(family: str, tmp_path: Path) -> None:
    folder = made(family, tmp_path)
    config = run_config(folder, 0.0)
    fitted, reason = fit_run(config, AutoConfig.from_pretrained(folder))
    assert fitted.packing is (family not in PADDED) and bool(reason) is (family in PADDED), reason
    loss, expected, mean = plain(config)
    padded = replace(config, data=replace(config.data, packing=False))
    for run in (fitted, padded)[family in PADDED :]:
        _, got, mine, seen = stepped(run)
        assert got == pytest.approx(loss, rel=2e-5)
        assert_same(expected, mine)
        assert seen.loss == pytest.approx(mean, rel=2e-5)
    if family in PADDED:
        return
    sparse = run_config(folder, 0.6)
    line, loss, expected, _ = stepped(sparse)
    rows, got, mine, _ = stepped(replace(sparse, data=replace(sparse.data, packing=False)))
    assert got == pytest.approx(loss, rel=1e-5)
    assert_same(expected, mine)
    chosen, other = selection(line), selection(rows)
    assert chosen and chosen.keys() == other.keys()
    assert all(
        torch.equal(kept, other[layer][group]) for layer, groups in chosen.items() for group, kept in groups.items()
    )


def test_adapters_on_experts_by_name(tmp_path: Path) -> None:
    """PEFT's ``target_parameters``, as its users write them."""
    folder = made("qwen3_moe", tmp_path)
    config = run_config(folder, 0.0)

    def asking(*parameters: str) -> RunConfig:
        values = {"r": 4, "target_modules": ["q_proj"], "target_parameters": list(parameters)}
        return replace(config, lora=LoraSection(values=values))

    run, base = asking("mlp.experts.gate_up_proj", "experts.down_proj"), AutoConfig.from_pretrained(folder)
    fit_run(run, base)
    loss, expected, _ = plain(run)
    _, got, mine, _ = stepped(run)
    assert got == pytest.approx(loss, rel=2e-5)
    assert_same(expected, mine)
    assert sum("experts" in name for name in mine) == 4 * 4  # A and B of two matrices in four layers.
    fit_run(asking("model.layers.3.mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj"), base)
    for wrong in ("mlp.experts.gate_proj", "self_attn.q_proj.weight", "up_down_proj"):
        with pytest.raises(
            ConfigError, match=rf"'lora.target_parameters' holds '{wrong}'.*allowed: mlp.experts.down_proj"
        ):
            fit_run(asking(wrong), base)
    dense = made("smollm3", tmp_path / "dense")
    with pytest.raises(ConfigError, match="no routed experts: use target_modules"):
        fit_run(asking("mlp.down_proj"), AutoConfig.from_pretrained(dense))
