"""Resident bytes by hand, and the parameter list against the library's own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from sparselora_dist import apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.codecs import NF4Codec
from sparselora_dist.config import ConfigError, RunConfig
from sparselora_dist.config.sparse import GROUPS
from sparselora_dist.engines.zero3 import resolve_auto
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.plan.hardware import GPUS, Cluster
from sparselora_dist.plan.layouts import make_plan
from sparselora_dist.plan.shapes import find_shape, from_hf_config
from sparselora_dist.plan.storage import Scheme, configured_scheme, engine_settings, resident, resident_bytes, tree_of
from sparselora_dist.plan.work import Batch, flop_model
from sparselora_dist.train.metrics import flop_model as loaded_flop_model
from support.every_type import tiny_model
from support.models import tiny_base, tiny_config
from support.plan_runs import ALL_LINEAR, SPARSE, run_data

TINY = from_hf_config(tiny_config().to_dict(), "tiny")
GB = 1e9


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "lora", [{}, {"lora_bias": True}, {"target_modules": ALL_LINEAR, "rank_pattern": {"down_proj": 2}}]
)
def test_the_parameters_are_those_of_the_model(family: str, lora: dict[str, Any]) -> None:
    data = run_data("fsdp2", dtype="float32", sparse=SPARSE)
    data["lora"] |= lora
    config = RunConfig.from_dict(data)
    base = tiny_base(family)
    shape = from_hf_config(base.config.to_dict(), "tiny")
    model = apply_sparselora(get_peft_model(base, config.lora.build()), config.sparse_lora)
    tree = tree_of(shape, config, configured_scheme(config, shape, 2))
    own = sorted((tuple(sorted(p.shape)), p.requires_grad) for p in model.parameters())
    # A dense o or down is stored transposed by a codec; here it may still be the model's own.
    assert sorted((tuple(sorted(p.shape)), p.trainable) for p in tree.parameters()) == own


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "phi3", "starcoder2", "olmo2", "deepseek_v3"])
def test_the_parameters_of_any_family(family: str) -> None:
    """Seen in its model without weights: adapters as PEFT places them, also on the parameters of experts."""
    base = tiny_model(family)
    layers = decoder_layers(base)
    data = run_data("fsdp2", dtype="float32")
    data["lora"]["target_modules"] = [layer.path_of(name) for layer in layers for name in layer.names]
    groups = {group for layer in layers for group in GROUPS if group not in layer.missing}
    data["sparse_lora"] = {"rank": 4, "layers": {group: {"auto": 0.5} for group in groups}}
    config = RunConfig.from_dict(data)
    shape = from_hf_config(base.config.to_dict(), "tiny")
    assert shape.elements == sum(p.numel() for p in base.parameters())
    model = apply_sparselora(get_peft_model(base, config.lora.build()), config.sparse_lora)
    tree = tree_of(shape, config, configured_scheme(config, shape, 2))
    own = sorted((tuple(sorted(p.shape)), p.requires_grad) for p in model.parameters())
    assert sorted((tuple(sorted(p.shape)), p.trainable) for p in tree.parameters()) == own
    assert flop_model(shape, config, tree) == loaded_flop_model(model, find_state(model))
    plan = make_plan(shape, config, Cluster(gpu=GPUS["h100-80gb"], gpus=4, per_node=4), Batch(tokens=64, length=32))
    assert plan.choice is not None and 0 < plan.choice.work.executed_flops < plan.choice.work.dense_flops


def test_llama_3_70b_in_nf4_replicated() -> None:
    """39.5 GB, as docs/planning.md says."""
    config = RunConfig.from_dict(run_data("fsdp2", four_bit=True, fsdp={"dp_shard_size": 1}))
    held = resident_bytes(find_shape("llama-3-70b"), config, 64)
    assert held["weights"] + held["scales"] == pytest.approx(39.5 * GB, rel=0.01)


def test_llama_3_8b_by_hand() -> None:
    config = RunConfig.from_dict(run_data("fsdp2", rank=16))
    held = resident_bytes(find_shape("llama-3-8b"), config, 8)
    lora = 32 * 16 * (4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096)
    assert held["weights"] == 8_030_261_248 * 2 // 8
    assert (held["scales"], held["factors"]) == (0, 0)
    assert (held["lora"], held["optimizer"]) == (lora * 4 // 8, lora * 8 // 8)
    assert held["total"] == sum(held[kind] for kind in ("weights", "lora", "optimizer"))


def test_zero3_holds_masters_moments_and_gradients() -> None:
    config = RunConfig.from_dict(run_data("zero3", rank=16, zero={"param_persistence_threshold": 0}))
    held = resident_bytes(find_shape("llama-3-8b"), config, 8)
    lora = 32 * 16 * (4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096)
    assert held["lora"] == lora * (2 + 2) // 8
    assert held["optimizer"] == lora * 12 // 8


def test_8bit_moments_are_a_byte_and_a_scale_per_256() -> None:
    """But for shards of fewer than 4096 elements: 4 bytes. ZeRO-3 steps all shards of a rank as one tensor."""

    def optimizer(engine: str, ranks: int, optim: str | None = "adamw_8bit") -> int:
        config = RunConfig.from_dict(run_data(engine, rank=16, optim=optim))
        return resident_bytes(find_shape("llama-3-8b"), config, ranks)["optimizer"]

    wide, narrow = 16 * 4096, 16 * 1024  # q's and o's A and B, k's and v's A; k's and v's B
    lora = 32 * (6 * wide + 2 * narrow)
    assert optimizer("fsdp2", 8, None) == optimizer("fsdp2", 8, "adamw_torch_fused") == lora * 8 // 8
    assert optimizer("fsdp2", 4) == lora * 2 * (1 + 4 / 256) / 4
    assert optimizer("fsdp2", 8) == 32 * (6 * wide * 2 * (1 + 4 / 256) + 2 * narrow * 8) / 8
    # A's 16 rows go to 16 of 32 ranks, whole; the rows of B are cut on.
    assert optimizer("fsdp2", 32) == 32 * (4 * 4096 * 2 * (1 + 4 / 256) + (2 * wide + 2 * narrow) * 8 / 32)
    assert optimizer("zero3", 32) == lora / 32 * (4 + 2 * (1 + 4 / 256))


def test_nf4_scales_are_counted_row_by_row() -> None:
    config = RunConfig.from_dict(run_data("fsdp2", four_bit=True))
    scheme = configured_scheme(config, TINY, 2)
    held = resident(tree_of(TINY, config, scheme), scheme)
    rows = {"q": 48, "k": 16, "v": 16, "gate": 104, "up": 104}
    codec = NF4Codec()
    expected = sum(rows.values()) * codec.parts(48)["scales"].width
    expected += (48 + 104) * codec.parts(48)["scales"].width  # o and down, transposed: rows of H values
    assert held["scales"] == 3 * expected // 2


def test_hpz_adds_a_copy_in_the_node() -> None:
    config = RunConfig.from_dict(run_data("zero3", zero={"param_persistence_threshold": 0}))
    shape = find_shape("llama-3-8b")
    settings = engine_settings(config, shape) | {"secondary": 8}
    scheme = Scheme(engine="zero3", world=64, shards=64, **settings)
    held = resident(tree_of(shape, config, scheme), scheme)
    assert held["weights"] == pytest.approx(shape.elements * 2 * (1 / 64 + 1 / 8), rel=1e-6)


def test_auto_values_are_the_engines() -> None:
    keys = ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "reduce_bucket_size")
    data = run_data("zero3")
    data["engine"]["deepspeed"] = {"zero_optimization": {"stage": 3} | dict.fromkeys(keys, "auto")}
    config = RunConfig.from_dict(data)
    own = resolve_auto(config.engine.deepspeed_config(), config, 2, TINY.hidden, 10)["zero_optimization"]
    settings = engine_settings(config, TINY)
    got = (settings["limits"].persistence, settings["limits"].prefetch, settings["bucket"])
    assert got == tuple(own[key] for key in keys)


def test_gathered_dtype_follows_the_policy() -> None:
    def gathered(**fsdp: Any) -> Any:
        return engine_settings(RunConfig.from_dict(run_data("fsdp2", fsdp=fsdp)), TINY)["gathered"]

    assert gathered() is torch.bfloat16
    assert gathered(fsdp_mixed_precision_policy="fp32") is torch.float32
    assert gathered(fsdp_mixed_precision_policy={"param_dtype": "bf16"}) is torch.bfloat16
    assert gathered(fsdp_mixed_precision_policy={"reduce_dtype": "fp32"}) is None


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"modules_to_save": ["lm_head"]}, r"'lora.modules_to_save' is \['lm_head'\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapters on lm_head are not planned"),
        ({"target_modules": ["c_attn"]}, "it matches none of q_proj"),
    ],
)
def test_what_is_not_modelled_is_refused(lora: dict[str, Any], message: str) -> None:
    data = run_data("fsdp2")
    data["lora"] |= lora
    with pytest.raises(ConfigError, match=message):
        resident_bytes(TINY, RunConfig.from_dict(data), 2)


def test_groups_must_fit_the_ranks() -> None:
    config = RunConfig.from_dict(run_data("fsdp2", fsdp={"dp_shard_size": 3}))
    with pytest.raises(ConfigError, match="do not make up 8 ranks"):
        resident_bytes(TINY, config, 8)
    with pytest.raises(ConfigError, match="single"):
        resident_bytes(TINY, RunConfig.from_dict(run_data("single")), 2)
