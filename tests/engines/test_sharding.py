"""What a rank of two holds: half of every frozen weight and factor, also between forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

FROZEN = [
    *(f"self_attn.{name}_proj.base_layer.rows" for name in "qkv"),
    "self_attn.o_proj.base_layer.rows",
    *(f"mlp.{name}" for name in ("gate_proj.rows", "up_proj.rows", "down_proj.rows")),
]
FACTORS = [
    *(f"self_attn.sparse_estimator.{name}_{side}" for name in "qkv" for side in "ab"),
    *(f"mlp.estimator.{name}_{side}" for name in ("gate", "up") for side in "ab"),
]


def of_sparse_layers(held: dict[str, Any], endings: list[str]) -> dict[str, Any]:
    found = {name: p for name, p in held.items() if any(name.endswith(ending) for ending in endings)}
    assert len(found) == 3 * len(endings), sorted(found)
    return found


@pytest.mark.parametrize("moment", ["start", "after steps"])
def test_each_rank_holds_half(sharded: Any, moment: str) -> None:
    ranks = [rank["sharding"][moment] for rank in sharded]
    for name, p in of_sparse_layers(ranks[0], FROZEN + FACTORS).items():
        whole, rows = math.prod(p["shape"]), p["shape"][0]
        # FSDP2 deals whole rows, ZeRO-3 elements; the padding is at most one of them.
        unit = whole // rows if p["dtensor"] else 1
        for rank in ranks:
            assert rank[name]["sharded"], name
            assert abs(rank[name]["local"] - whole / 2) <= unit, (name, rank[name])
        assert sum(rank[name]["local"] for rank in ranks) - whole in ((0,) if p["dtensor"] else (0, 1)), name
    # The rest, LoRA included: nothing is whole on a rank.
    for rank in ranks:
        assert all(p["sharded"] for p in rank.values()), [name for name, p in rank.items() if not p["sharded"]]


def test_fsdp2_holds_dtensors(fsdp2: Any) -> None:
    for rank in fsdp2:
        for moment in ("start", "after steps"):
            assert all(p["dtensor"] for p in rank["sharding"][moment].values())


def test_factors_are_frozen_parameters(sharded: Any) -> None:
    for rank in sharded:
        for moment in ("start", "after steps"):
            held = rank["sharding"][moment]
            for name, p in of_sparse_layers(held, FROZEN + FACTORS).items():
                assert not p["trainable"] and not p["buffer"], name


def test_fp32_stays_fp32(sharded: Any) -> None:
    for rank in sharded:
        assert {p["dtype"] for p in rank["sharding"]["after steps"].values()} == {torch.float32}


def test_bf16_keeps_frozen_weights_and_factors_in_bf16(zero3: Any, fsdp2: Any) -> None:
    for engine in (zero3, fsdp2):
        for rank in engine:
            seen = rank["sharding"]["bf16"]
            frozen = of_sparse_layers(seen["held"], FROZEN + FACTORS)
            assert {p["dtype"] for p in frozen.values()} == {torch.bfloat16}
            # The masters that the optimizer changes and a checkpoint holds are fp32.
            masters = seen["masters"]
            assert {p.dtype for p in masters.values()} == {torch.float32}
            assert any(not torch.equal(p, p.bfloat16().float()) for p in masters.values())
            assert math.isfinite(seen["loss"]) and math.isfinite(seen["norm"])
            trained = {p["dtype"] for p in seen["held"].values() if p["trainable"]}
            assert trained == ({torch.bfloat16} if engine is zero3 else {torch.float32})


@pytest.mark.parametrize("step", ["memory", "memory dense", "memory fused"])
def test_nothing_is_whole_between_forward_and_backward(sharded: Any, step: str) -> None:
    for rank in sharded:
        seen = rank["sharding"][step]
        assert seen["sparse"] == (step != "memory dense")
        assert seen["whole between"] == [] and seen["gathered"] == []
        assert seen["saved"] > 50
        # Activations are smaller than the smallest slice of kept rows, so size alone tells a weight.
        assert seen["large"] == []


def test_a_sharded_model_has_the_names_of_its_family(fsdp2: Any) -> None:
    """In state dicts, whole or of shards, and in those that are loaded."""
    seen = fsdp2[0]["family names"]  # A whole one is rank 0's.
    for expected, got in (("plain", "whole"), ("plain", "shards"), ("other", "loaded")):
        assert seen[expected].keys() == seen[got].keys()
        assert all(torch.equal(value, seen[got][name]) for name, value in seen[expected].items())
