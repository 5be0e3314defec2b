"""Fidelity of the estimator: by hand on tiny tensors, against training's own masks, and on trained models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import estimator_factors
from sparselora_dist.config import RunConfig
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layouts import causal_lm, decoder_layers, geometry
from sparselora_dist.method.channels import HeadGeometry
from sparselora_dist.method.estimator import low_rank_factors
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.quality.fidelity import (
    Site,
    Spread,
    energy_share,
    estimated_sums,
    exact_sums,
    group_means,
    overlap,
    random_channels,
    scores_of,
    truncated,
)
from sparselora_dist.quality.observe import Observer, observe
from sparselora_dist.quality.subject import Subject, measure
from support.compare import assert_close
from support.harness import ROOT
from support.models import ALL_LINEAR, FUSED, LAYOUTS, batch, tiny_base, tiny_lora

HEADS = HeadGeometry(heads=6, kv_heads=2, head_dim=8)
HIDDEN, WIDTH, TOKENS = 10, 13, 7
SHAPES = {"q_proj": 48, "k_proj": 16, "v_proj": 16, "gate_proj": WIDTH, "up_proj": WIDTH}
NAMES = {"ffn": ("gate_proj", "up_proj"), "qk": ("q_proj", "k_proj"), "vo": ("v_proj",)}
CPU = torch.device("cpu")
SPARSITY = {"ffn": {0: 0.8, 2: 0.5}, "qk": {1: 0.5}, "vo": {1: 0.6, 2: 0.4}}


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def by_hand(group: str, outputs: dict[str, Tensor], rows: list[int]) -> list[float]:
    """The formulas of the method, one number at a time."""
    table = {name: output.tolist() for name, output in outputs.items()}
    if group == "ffn":
        return [sum((silu(table["gate_proj"][t][j]) * table["up_proj"][t][j]) ** 2 for t in rows) for j in range(WIDTH)]
    if group == "vo":
        return [sum(table["v_proj"][t][j] ** 2 for t in rows) for j in range(16)]
    scores = []
    for h in range(2):
        for p in range(4):
            keys = sum(table["k_proj"][t][h * 8 + d] ** 2 for t in rows for d in (p, p + 4))
            queries = sum(
                table["q_proj"][t][g * 8 + d] ** 2 for t in rows for g in range(6) if g // 3 == h for d in (p, p + 4)
            )
            scores.append(keys * queries)
    return scores


@pytest.mark.parametrize("group", ["ffn", "qk", "vo"])
def test_scores_are_the_formulas(group: str) -> None:
    """Exact ones by hand; the estimator at full rank gives the same, and a smaller rank is the smaller SVD."""
    x, rows = torch.randn(TOKENS, HIDDEN), torch.tensor([0, 2, 3, 6])
    weights = {name: torch.randn(SHAPES[name], HIDDEN) for name in NAMES[group]}
    outputs = {name: x @ weight.t() for name, weight in weights.items()}
    act = torch.nn.functional.silu
    exact = exact_sums(group, outputs, rows, HEADS, act)
    expected = torch.tensor(by_hand(group, outputs, rows.tolist()), dtype=torch.float64)
    assert_close(f"{group} exact", expected, scores_of(exact), rtol=1e-4, atol=1e-5)
    full = {name: low_rank_factors(weight, HIDDEN) for name, weight in weights.items()}
    assert_close(f"{group} full rank", exact, estimated_sums(group, x, rows, full, HEADS, act), rtol=1e-3, atol=1e-4)
    for name, weight in weights.items():
        for small, cut in zip(low_rank_factors(weight, 3), truncated(full[name], 3)):
            assert_close(f"{name} rank 3", small.abs(), cut.abs(), rtol=1e-4, atol=1e-5)
    # Halves add up to the whole before the product is taken.
    parts = [exact_sums(group, outputs, part, HEADS, act) for part in (rows[:1], rows[1:])]
    assert_close(f"{group} halves", exact, sum(parts), rtol=1e-5, atol=1e-6)


def test_figures_of_a_choice() -> None:
    energy = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert overlap(torch.tensor([0, 3]), torch.tensor([0, 2])) == 0.5
    assert energy_share(torch.tensor([0, 3]), energy) == pytest.approx(0.6)
    assert energy_share(torch.tensor([0]), torch.zeros(4)) == 1.0
    assert Spread.of([]) is None and Spread.of([0.5]) == Spread(0.5, 0.0)
    assert Spread.of([0.0, 1.0]) == Spread(0.5, pytest.approx(math.sqrt(0.5)))
    # A random choice recalls k / n.
    draws = [random_channels(50, 10, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert all(len(draw.unique()) == 10 for draw in draws)
    assert sum(overlap(draw, draws[0]) for draw in draws[1:]) / 299 == pytest.approx(0.2, abs=0.03)


def test_a_site_over_batches() -> None:
    """Two batches by hand: recall, energy, steps and ranks; a half without context tokens is not compared."""
    site = Site(layer=3, group="vo", channels=4, keep=2, sparsity=0.5, own_rank=1)
    first = torch.tensor([[[5.0, 4, 0, 0]], [[0, 0, 3.0, 1]]])  # together 5 4 3 1: keeps 0, 1
    guess = torch.tensor([[[5.0, 0, 4, 0]], [[5.0, 0, 4, 0]]])  # keeps 0, 2 in both halves
    generator = torch.Generator().manual_seed(0)
    site.add(first, {1: guess, 4: first}, generator, adapted=guess)
    site.add(first, {1: first, 4: first}, generator, filled=(True, False))
    data: Any = site.to_dict()
    assert site.recall["1"] == [0.5, 1.0] and site.recall["4"] == site.recall["exact"] == [1.0, 1.0]
    assert site.energy["1"] == pytest.approx([8 / 13, 9 / 13]) and site.energy["exact"] == pytest.approx([9 / 13] * 2)
    assert site.ranks == [1.0] and site.steps == [0.5] and site.adapted_recall == [1.0]
    assert data["recall"]["1"] == {"mean": 0.75, "spread": pytest.approx(math.sqrt(0.125))}
    assert data["random_expected"] == 0.5 and data["between_steps"] == {"mean": 0.5, "spread": 0.0}
    means: Any = group_means([site])["vo"]
    assert means["layers"] == 1 and means["recall"]["1"] == 0.75 and means["between_ranks"] == 1.0
    json.dumps([data, means])


def observer_of(model: Any, ranks: list[int], own: int, sparsity: Any = SPARSITY) -> Observer:
    factors = estimator_factors(model, sparsity, SparseLoRAConfig(rank=max(ranks)), ModelWeights(model))
    return Observer(model, sparsity, factors, ranks=ranks, own_rank=own)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", *LAYOUTS])
def test_full_rank_recalls_everything(family: str) -> None:
    """Biases and q/k norms are no part of what is estimated."""
    model = tiny_base(family)
    observer = observer_of(model, [4, 48], own=4)
    seen = observe(model, observer, [batch(seed=seed) for seed in range(3)], CPU)
    assert seen.batches == 3 and {(site.layer, site.group) for site in seen.sites} == {
        (layer, group) for group, by_layer in SPARSITY.items() for layer in by_layer
    }
    for site in seen.sites:
        assert site.recall["48"] == [1.0] * 3, site
        assert len(site.steps) == 2 and len(site.ranks) == 3 and not site.adapted_recall
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("group,layer", [("ffn", 0), ("qk", 0), ("vo", 0), ("ffn", 2)])
def test_the_masks_are_those_of_training(group: str, layer: int) -> None:
    """With one sparse layer its input in training is that of the dense forward, and so is its mask."""
    sparsity, data = {group: {layer: 0.6}}, batch()
    model = tiny_lora(targets=ALL_LINEAR)
    observer = observer_of(model, [4], own=4, sparsity=sparsity)
    observe(model, observer, [data], CPU)
    apply_sparselora(model.train(), SparseLoRAConfig(rank=4, layers={group: {str(layer): 0.6}}))
    model(**data, output_hidden_states=True)  # Otherwise the last layer's FFN has no context tokens.
    assert torch.equal(observer.sites[layer, group].last, selection(model)[layer][group])


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_masks_of_other_layouts_are_those_of_training(family: str) -> None:
    sparsity = {"ffn": {0: 0.6}, "qk": {0: 0.5}, "vo": {0: 0.5}}
    model, data = tiny_lora(family, FUSED[family]), batch()
    observer = observer_of(model, [4], own=4, sparsity=sparsity)
    observe(model, observer, [data], CPU)
    layers = {group: {"0": value} for group, by_layer in sparsity.items() for value in by_layer.values()}
    apply_sparselora(model.train(), SparseLoRAConfig(rank=4, layers=layers))
    model(**data)
    # Attention comes first, and changes what the FFN reads unless the layer computes both side by side (GPT-NeoX).
    for group in ("qk", "vo", *(["ffn"] if family == "gpt_neox" else [])):
        assert torch.equal(observer.sites[0, group].last, selection(model)[0][group]), group


def test_the_adapter_is_seen() -> None:
    """Activations with the LoRA branch are another oracle, where a scored matrix has one."""
    model, data = tiny_lora(targets=["q_proj", "up_proj"]).eval(), batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    observer = observer_of(model, [48], own=48)
    observe(model, observer, [data], CPU)
    # By hand, in layer 0: its MLP's input from a forward of the model.
    layer, kept = decoder_layers(causal_lm(model))[0], {}
    handle = layer.module.mlp.register_forward_pre_hook(lambda module, args: kept.update(x=args[0]))
    with torch.no_grad():
        model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
        handle.remove()
        rows = partition_tokens(data["labels"], data["attention_mask"]).context
        mlp: Any = layer.module.mlp
        outputs = {name: getattr(mlp, name)(kept["x"]).flatten(0, 1) for name in NAMES["ffn"]}
        energy = scores_of(exact_sums("ffn", outputs, rows, geometry(model), mlp.act_fn))
    site = observer.sites[0, "ffn"]
    expected = overlap(site.last, energy.topk(site.keep).indices)
    assert site.recall["48"] == [1.0] and site.adapted_recall == [pytest.approx(expected)] and expected < 1
    assert observer.sites[1, "qk"].adapted_recall and not observer.sites[1, "vo"].adapted_recall


def test_batches_without_context_tokens_say_nothing() -> None:
    model = tiny_base()
    observer = observer_of(model, [4], own=4)
    data = batch()
    everything = data | {"labels": data["input_ids"].clone()}
    seen = observe(model, observer, [everything, data], CPU)
    assert seen.batches == 1 and seen.context_tokens < seen.tokens
    with pytest.raises(ValueError, match="training rank 8 is not among the ranks"):
        Observer(model, SPARSITY, {}, ranks=[4], own_rank=8)


# --- trained models ---------------------------------------------------------------------------------------------------


def subject(model: Path, data: Path, layers: dict[str, Any], **sections: Any) -> Subject:
    run = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 384},
        "train": {"output_dir": "unused", "per_device_train_batch_size": 8},
        "sparse_lora": {"layers": layers},
    }
    return Subject(config=RunConfig.from_dict(run | sections), run=None, adapter=None)


def assert_ordered(fidelity: dict[str, Any]) -> None:
    """random < rank 8 <= rank 32 <= exact, in recall and in energy, for each group."""
    for group, means in fidelity["groups"].items():
        for figure in ("recall", "energy"):
            random, low, high, exact = (means[figure][name] for name in ("random", "8", "32", "exact"))
            assert random < low <= high <= exact, (group, figure, means[figure])
        assert means["recall"]["exact"] == 1.0
        assert means["recall"]["random"] == pytest.approx(means["random_expected"], abs=0.1)
        assert means["random_expected"] < means["recall"]["8"]


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
def test_random_below_rank_8_below_rank_32_below_exact(four_bit: bool) -> None:
    """On a trained model, streamed as a run streams it."""
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layers = {"ffn": {"1-4": 0.9}, "qk": {"2-4": 0.5}, "vo": {"2-4": 0.5}}
    demo = subject(ROOT / "demo/model", ROOT / "demo/data/eval.jsonl", layers, quantization={"load_in_4bit": four_bit})
    fidelity = measure(demo, rows=32)
    assert fidelity["batches"] == 4 and fidelity["ranks"] == [8, 32] and len(fidelity["sites"]) == 10
    assert_ordered(fidelity)


@pytest.mark.parametrize("data", ["math/eval.jsonl", "commonsense/boolq_test.jsonl"])
def test_the_same_on_real_text(shared: Path, data: str) -> None:
    layers = {"ffn": {"2-6": 0.9}, "qk": {"3-6": 0.5}, "vo": {"3-6": 0.5}}
    assert_ordered(measure(subject(shared / "models/base-9m", shared / "data" / data, layers), rows=16))
