"""Gathered bytes by hand; against running engines they are compared in test_against_engines.py."""

from __future__ import annotations

from typing import Any

import pytest

from sparselora_dist.config import RunConfig
from sparselora_dist.plan.shapes import find_shape
from sparselora_dist.plan.storage import Scheme, checkpointing, configured_scheme, tree_of
from sparselora_dist.plan.traffic import Traffic, traffic
from sparselora_dist.plan.zero_replay import ZeroLimits, fetches
from support.plan_runs import NOTHING_KEPT, SPARSE, run_data

SHAPE = find_shape("llama-3-8b")
BF16 = 2 * SHAPE.elements
ENDS = 2 * 2 * 128256 * 4096


def moved(scheme: Scheme | None = None, world: int = 8, **run: Any) -> Traffic:
    config = RunConfig.from_dict(run_data(run.pop("engine"), rank=8, **run))
    scheme = scheme or configured_scheme(config, SHAPE, world)
    steps = config.train.gradient_accumulation_steps
    return traffic(tree_of(SHAPE, config, scheme), scheme, checkpointing(config), steps)


def lora_bytes() -> int:
    return 2 * 32 * 8 * (4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_fsdp2_gathers_twice(reentrant: bool | None) -> None:
    """But for the embedding and the LM head, which backward does not read."""
    assert moved(engine="fsdp2", reentrant=reentrant).gathered == 2 * (BF16 + lora_bytes()) - ENDS


def test_fsdp2_gathers_a_head_that_gives_logits_twice() -> None:
    whole = {"enabled": False, "skip_unused_logits": False}
    assert moved(engine="fsdp2", sparse=whole).gathered == 2 * (BF16 + lora_bytes()) - ENDS // 2


def test_fsdp2_gathers_tied_ends_once() -> None:
    tied = find_shape("llama-3.2-1b")
    assert tied.tied
    config = RunConfig.from_dict(run_data("fsdp2", rank=8))
    scheme = configured_scheme(config, tied, 8)
    tree = tree_of(tied, config, scheme)
    found = traffic(tree, scheme, "none", 1)
    ends = 2 * 128256 * 2048
    assert found.gathered == 2 * sum(map(scheme.gathered_bytes, tree.parameters())) - ends
    # They stay while the layers run.
    layers = [sum(map(scheme.unsharded_bytes, layer.walk())) for layer in tree.layers]
    assert found.live == ends + 2 * max(layers) + 2 * 2048


def test_fsdp2_without_resharding_gathers_once_per_micro_batch() -> None:
    fsdp = {"fsdp_reshard_after_forward": False}
    assert moved(engine="fsdp2", fsdp=fsdp, accumulation=3).gathered == 3 * (BF16 + lora_bytes())


def test_shards_in_a_node_move_nothing_between_nodes() -> None:
    found = moved(engine="fsdp2", world=64, fsdp={"dp_shard_size": 8})
    assert set(found.wire) == {8}
    # fp32 gradients of a rank's share of the adapters, added over 8 replicas.
    assert found.across == pytest.approx(2 * 7 / 8 * 2 * lora_bytes() / 8)


def test_replicas_gather_nothing() -> None:
    found = moved(engine="fsdp2", world=8, fsdp={"dp_shard_size": 1})
    assert found.gathered == 0 and sum(found.wire.values()) == 0
    assert found.across == pytest.approx(2 * 7 / 8 * 2 * lora_bytes())


def test_zero3_with_nothing_kept_gathers_ahead_of_every_use() -> None:
    """The embedding and the first norm once (no gradient there), the rest twice."""
    found = moved(engine="zero3", zero=NOTHING_KEPT)
    once = 2 * (128256 * 4096 + 4096)
    assert found.gathered == 2 * (BF16 + lora_bytes()) - once


def test_zero3_recomputation_fetches_attention_a_third_time() -> None:
    found = moved(engine="zero3", zero=NOTHING_KEPT, reentrant=False)
    norms = 2 * 4096
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    # Of the FFN, gate and up three times and down twice; LoRA three times; the head and the last norm twice.
    layers = 32 * (3 * (attention + norms) + (3 + 3 + 2) * 4096 * 14336)
    expected = 2 * (layers + 4 * 128256 * 4096 + 2 * 4096) + 3 * lora_bytes()
    assert found.gathered == expected


def test_zero3_reentrant_recomputation_keeps_frozen_weights_for_backward() -> None:
    found = moved(engine="zero3", zero=NOTHING_KEPT, reentrant=True)
    assert found.gathered == 2 * BF16 + 3 * lora_bytes()


def test_a_sparse_ffn_is_fetched_twice_whole() -> None:
    config = RunConfig.from_dict(run_data("zero3", sparse=SPARSE, reentrant=False, zero=NOTHING_KEPT))
    tree = tree_of(SHAPE, config, configured_scheme(config, SHAPE, 8))
    counts = fetches(tree, ZeroLimits(persistence=0, max_live=0, max_reuse=0, prefetch=0), "non-reentrant", 1).counts
    by_name = {p.name: count for p, count in counts.items()}
    assert {by_name[f"layers.0.mlp.{name}_proj.rows"] for name in ("gate", "up", "down")} == {2}
    assert by_name["layers.0.gate_proj_a"] == 2  # with its FFN
    assert by_name["layers.1.q_proj_a"] == 1  # when the mask is chosen, and never again
    assert by_name["layers.0.self_attn.q_proj.rows"] == 3


def test_what_persists_is_gathered_once_a_step() -> None:
    everything = {"param_persistence_threshold": 10**10}
    for accumulation in (1, 4):
        found = moved(engine="zero3", zero=everything, accumulation=accumulation)
        assert found.gathered == BF16 + lora_bytes()
        assert found.live == 0


def test_hpz_moves_frozen_weights_inside_the_node() -> None:
    config = RunConfig.from_dict(run_data("zero3", zero=NOTHING_KEPT | {"max_live_parameters": 10**9}))
    plain = configured_scheme(config, SHAPE, 64)
    hpz = Scheme(engine="zero3", world=64, shards=64, secondary=8, limits=plain.limits)
    found = moved(hpz, engine="zero3")
    assert found.gathered == moved(plain, engine="zero3").gathered
    assert found.wire[8] == pytest.approx((found.gathered - lora_bytes()) * 7 / 8, rel=1e-6)
    # The adapters' first gather after the optimizer step, and their gradients.
    assert found.wire[64] == pytest.approx(2 * lora_bytes() * 63 / 64, rel=1e-6)
    assert found.reduced == {64: pytest.approx(lora_bytes() * 63 / 64)}


def test_live_bytes_of_a_layer_and_the_next() -> None:
    found = moved(engine="fsdp2")
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + lora_bytes() // 32
    # The LM head arrives while the last layer runs.
    assert found.live == layer + ENDS // 2 + 2 * 4096
