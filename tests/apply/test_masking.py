"""Which layers are masked, what is refused, and that nothing that is merged in memory fills a pruned position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparselora_dist import SparseBaseConfig, SparseLoRAConfig, apply_sparselora, remove_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.config import RunConfig
from sparselora_dist.config.errors import ConfigError
from support.applied import anatomy
from support.masked import base_weights, lost, pruned_lora
from support.models import ALL_LINEAR, batch, tiny_base, tiny_lora

SPARSE = SparseLoRAConfig(layers={"ffn": {"0-2": 0.8}, "qk": {"1": 0.5}}, rank=4)


def masked(**options: Any) -> Any:
    return apply_sparselora(pruned_lora(**options), SPARSE, sparse_base=SparseBaseConfig())


def logits(model: nn.Module) -> torch.Tensor:
    data = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**data).logits


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_and_unloaded_no_zero_is_lost(safe: bool, dtype: torch.dtype) -> None:
    model = masked(dtype=dtype)
    before, expected = base_weights(pruned_lora(dtype=dtype)), logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    after = {name: p.detach() for name, p in merged.named_parameters()}
    assert lost(before, after) == 0
    changed = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    assert changed > 1000, "something was merged"
    torch.testing.assert_close(logits(merged), expected, **({"rtol": 0.1, "atol": 0.1} if dtype.itemsize == 2 else {}))


def test_unmasked_lora_does_lose_them() -> None:
    """The comparison can tell."""
    model = apply_sparselora(pruned_lora(), SPARSE)
    before = base_weights(pruned_lora())
    assert lost(before, dict(model.merge_and_unload().named_parameters())) > 1000


def test_merged_in_place_and_taken_out_again() -> None:
    model = masked()
    before, expected = base_weights(pruned_lora()), logits(model)
    # A kept weight that the adapter takes to exactly zero comes back.
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    weight = layer.base_layer.weight.data
    row, column = (weight != 0).nonzero()[0].tolist()
    before["model.layers.1.self_attn.v_proj.weight"][row, column] = weight[row, column] = -layer.get_delta_weight(
        "default"
    )[row, column]
    layer.get_delta_weight.lost = None
    expected = logits(model)
    model.merge_adapter()
    assert layer.base_layer.weight[row, column] == 0
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    after = {name: weight for name, weight in base_weights(model).items() if name in before}
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0), name


def test_switched_off_it_is_the_base_model() -> None:
    model = masked()
    with model.disable_adapter():
        got = logits(model)
    torch.testing.assert_close(got, logits(pruned_lora().unload()))


def test_removing_warns_of_the_masks_and_leaves_plain_peft() -> None:
    plain = pruned_lora()
    model = masked()
    before = {name: set(vars(module)) for name, module in plain.named_modules()}
    with pytest.warns(UserWarning, match=r"21 adapters were trained under the mask .*sparselora-dist merge"):
        remove_sparselora(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model), logits(plain))


def dora() -> Any:
    base = pruned_lora().unload()
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))


def two() -> Any:
    model = pruned_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def with_bias() -> Any:
    base = pruned_lora().unload()
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"))


BAD = {
    "a base without zeros": (
        tiny_lora,
        {},
        r"no adapter is on a pruned matrix \(zeros from 20%; the most has model\..*",
    ),
    "no adapter": (tiny_base, {}, "the model has none"),
    "DoRA": (dora, {}, r"layers\.0\.self_attn\.q_proj uses a LoRA variant \(DoRA\)"),
    "dropout": (lambda: pruned_lora(dropout=0.1), {}, r"q_proj is pruned.*lora_dropout 0\.1"),
    "two adapters": (two, {}, r"q_proj is pruned.*2 adapters are active"),
    "a bias": (with_bias, {}, r"q_proj is pruned.*lora_bias"),
    "whole branches": (pruned_lora, {"lora_branch": "dense"}, r"lora_branch is 'dense' with a sparse base"),
}


ONLY = {"whole branches": True, "no adapter": False}
"""Said where something is sparse, or where nothing is."""


@pytest.mark.parametrize(
    ("what", "enabled"),
    [(what, enabled) for what in BAD for enabled in (True, False) if what not in ONLY or ONLY[what] == enabled],
)
def test_refused_by_name_and_left_as_it_was(what: str, enabled: bool) -> None:
    make, options, message = BAD[what]
    model = make()
    before = anatomy(model)
    layers = {"ffn": {"0-2": 0.8}} if enabled else {}
    with pytest.raises(ValueError, match=message):
        apply_sparselora(
            model, SparseLoRAConfig(enabled=enabled, layers=layers, rank=4, **options), sparse_base=SparseBaseConfig()
        )
    assert anatomy(model) == before
    assert find_state(model) is None


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"lora": {"lora_dropout": 0.05}}, r"'lora\.lora_dropout' is 0\.05 with 'sparse_base\.enabled'"),
        ({"lora": {"lora_bias": True}}, r"'lora\.lora_bias' is true"),
        ({"lora": {"target_parameters": ["mlp.experts.down_proj"]}}, r"'lora\.target_parameters'"),
        ({"sparse_lora": {"layers": {"ffn": {"0": 0.5}}, "lora_branch": "dense"}}, r"'sparse_lora\.lora_branch'"),
        ({"sparse_base": {"enabled": True, "gradient": "none"}}, r"'sparse_base\.gradient'"),
        ({"sparse_base": {"enabled": True, "min_sparsity": 2}}, r"'sparse_base\.min_sparsity'"),
        ({"sparse_base": {"enabled": True, "start": "gradient"}, "lora": {"init_from": "a"}}, r"'sparse_base\.start'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_run_that_cannot_be_masked_is_refused_before_anything_loads(sections: dict, key: str) -> None:
    run = {
        "model": {"name_or_path": "m"},
        "data": {"train": "t.jsonl"},
        "train": {"output_dir": "o"},
        "sparse_base": {"enabled": True},
    }
    with pytest.raises(ConfigError, match=key):
        RunConfig.from_dict(run | sections)


def test_without_the_section_nothing_is_masked() -> None:
    model = apply_sparselora(pruned_lora(), SPARSE)
    assert find_state(model).masked == {}
    model = apply_sparselora(pruned_lora(), SPARSE, sparse_base=SparseBaseConfig(enabled=False))
    assert find_state(model).masked == {}
