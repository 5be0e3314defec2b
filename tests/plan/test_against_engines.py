"""The plan's bytes against what real engines hold and gather, to the byte: 2 and 4 ranks, ZeRO-3 and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest

from sparselora_dist.config import RunConfig
from sparselora_dist.plan.shapes import from_hf_config
from sparselora_dist.plan.storage import checkpointing, configured_scheme, resident_bytes, tree_of
from sparselora_dist.plan.traffic import Traffic, traffic
from support.harness import run_ranks
from support.models import tiny_config
from support.plan_runs import ALL_LINEAR, NOTHING_KEPT, SOME_KEPT, SPARSE, run_data
from support.versions import can_nf4, nf4_case

SHAPE = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 104}
ODD = SHAPE | {"vocab_size": 97}
TIED = SHAPE | {"family": "qwen3", "tie_word_embeddings": True}
WHOLE_LOGITS = SPARSE | {"skip_unused_logits": False}
Case = tuple[dict[str, Any], dict[str, Any]]

WHOLE_BLOCKS = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# name: (run, model shape)
ON_TWO: dict[str, Case] = {
    "fsdp2 bf16": (run_data("fsdp2", sparse=SPARSE), SHAPE),
    "fsdp2 bf16 dense": (run_data("fsdp2"), SHAPE),
    "fsdp2 fp32 odd": (run_data("fsdp2", dtype="float32", sparse=SPARSE | {"rank": 3}, rank=3), ODD),
    "fsdp2 non-reentrant": (run_data("fsdp2", sparse=SPARSE, reentrant=False, accumulation=2), SHAPE),
    "fsdp2 reentrant": (run_data("fsdp2", sparse=SPARSE, reentrant=True), SHAPE),
    "fsdp2 not resharded": (
        run_data("fsdp2", reentrant=False, targets=ALL_LINEAR, fsdp={"fsdp_reshard_after_forward": False}),
        TIED,
    ),
    "fsdp2 tied": (run_data("fsdp2", sparse=SPARSE, reentrant=True, accumulation=2), TIED),
    "fsdp2 tied, logits whole": (run_data("fsdp2", sparse=WHOLE_LOGITS), TIED),
    "fsdp2 logits whole": (run_data("fsdp2", sparse=WHOLE_LOGITS, reentrant=False), SHAPE),
    "zero3 bf16": (run_data("zero3", sparse=SPARSE, zero=NOTHING_KEPT), SHAPE),
    "zero3 bf16 dense": (run_data("zero3", zero=NOTHING_KEPT), SHAPE),
    "zero3 fp32 odd": (
        run_data("zero3", dtype="float32", sparse=SPARSE | {"rank": 3}, rank=3, zero=NOTHING_KEPT),
        ODD,
    ),
    "zero3 kept": (run_data("zero3", sparse=SPARSE, zero=SOME_KEPT, targets=ALL_LINEAR), SHAPE),
    "zero3 defaults": (run_data("zero3", sparse=SPARSE), SHAPE),
    "zero3 non-reentrant": (run_data("zero3", sparse=SPARSE, reentrant=False, zero=NOTHING_KEPT), SHAPE),
    "zero3 non-reentrant kept": (
        run_data("zero3", sparse=SPARSE, reentrant=False, zero=SOME_KEPT, targets=["q_proj", "down_proj"]),
        TIED,
    ),
    "zero3 reentrant": (run_data("zero3", sparse=SPARSE, reentrant=True, zero=SOME_KEPT), SHAPE),
    "fsdp2 nf4": (run_data("fsdp2", sparse=SPARSE, four_bit=True), WHOLE_BLOCKS),
    "fsdp2 nf4 dense, padded rows": (run_data("fsdp2", four_bit=True, reentrant=False), SHAPE),
    "zero3 nf4": (run_data("zero3", sparse=SPARSE, four_bit=True, zero=NOTHING_KEPT), WHOLE_BLOCKS),
    "zero3 nf4 kept, non-reentrant": (
        run_data("zero3", sparse=SPARSE, four_bit=True, zero=SOME_KEPT, reentrant=False, accumulation=2),
        SHAPE | {"family": "qwen2"},
    ),
    "zero3 accumulated": (
        run_data("zero3", sparse=SPARSE, reentrant=False, zero=SOME_KEPT, accumulation=3),
        SHAPE | {"family": "qwen2"},
    ),
}
# A rank at which a shard of most adapters has 4096 elements.
for engine in ("fsdp2", "zero3"):
    ON_TWO[f"{engine} 8-bit"] = (run_data(engine, optim="adamw_8bit", rank=200), SHAPE)
ON_FOUR: dict[str, Case] = {
    "fsdp2 bf16": (run_data("fsdp2", sparse=SPARSE), SHAPE),
    "fsdp2 fp32 odd": (run_data("fsdp2", dtype="float32", sparse=SPARSE | {"rank": 3}, rank=3), ODD),
    "zero3 bf16": (run_data("zero3", sparse=SPARSE, zero=SOME_KEPT), SHAPE),
    "zero3 fp32 odd": (
        run_data("zero3", dtype="float32", sparse=SPARSE | {"rank": 3}, rank=3, zero=NOTHING_KEPT, reentrant=False),
        ODD,
    ),
    "fsdp2 nf4": (run_data("fsdp2", sparse=SPARSE, four_bit=True), WHOLE_BLOCKS),
    "zero3 nf4": (run_data("zero3", sparse=SPARSE, four_bit=True, zero=SOME_KEPT), SHAPE),
    "hsdp nf4": (run_data("fsdp2", sparse=SPARSE, four_bit=True, fsdp={"dp_shard_size": 2}), WHOLE_BLOCKS),
    "replicated nf4": (run_data("fsdp2", sparse=SPARSE, four_bit=True, fsdp={"dp_shard_size": 1}), WHOLE_BLOCKS),
    "zero3-hpz nf4": (run_data("zero3", sparse=SPARSE, four_bit=True, zero=NOTHING_KEPT, hpz=2), WHOLE_BLOCKS),
    "zero3-hpz": (run_data("zero3", sparse=SPARSE, zero=NOTHING_KEPT, hpz=2, reentrant=False), SHAPE),
    "zero3-hpz kept": (run_data("zero3", sparse=SPARSE, zero=SOME_KEPT, hpz=2), SHAPE),
}
CASES = {(2, name): case for name, case in ON_TWO.items()} | {(4, name): case for name, case in ON_FOUR.items()}


def four_bit(case: Case) -> bool:
    return "quantization" in case[0]


def engine_of(case: Case) -> str:
    return str(case[0]["engine"]["name"])


EVERY = [nf4_case(engine_of(case), *key) if four_bit(case) else key for key, case in CASES.items()]


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Any]]]:
    return {
        ranks: run_ranks("support.plan_workers:cases", ranks, possible, timeout=300)
        for ranks, runs in ((2, ON_TWO), (4, ON_FOUR))
        for possible in [{n: case for n, case in runs.items() if not four_bit(case) or can_nf4(engine_of(case))}]
    }


def planned(case: Case, ranks: int) -> tuple[dict[str, int], Traffic]:
    data, model = case
    config = RunConfig.from_dict(data)
    family = model.get("family", "llama")
    given = tiny_config(family, **{key: value for key, value in model.items() if key != "family"}).to_dict()
    shape = from_hf_config(given, "tiny")
    scheme = configured_scheme(config, shape, ranks)
    tree = tree_of(shape, config, scheme)
    moved = traffic(tree, scheme, checkpointing(config), config.train.gradient_accumulation_steps)
    return resident_bytes(shape, config, ranks), moved


def test_there_are_enough_combinations() -> None:
    assert len(CASES) >= 12


@pytest.mark.parametrize("ranks, name", EVERY)
def test_resident_bytes_by_kind(measured: Any, ranks: int, name: str) -> None:
    """Within 5 % on the fullest rank; every kind that is there is there in the plan."""
    expected, _ = planned(CASES[ranks, name], ranks)
    for kind in ("weights", "scales", "factors", "lora", "optimizer"):
        fullest = max(rank[name]["resident"][kind] for rank in measured[ranks])
        assert (fullest == 0) == (expected[kind] == 0), kind
        assert abs(expected[kind] - fullest) <= 0.05 * fullest, (kind, expected[kind], fullest)


@pytest.mark.parametrize("ranks, name", EVERY)
def test_gathered_bytes_are_equal(measured: Any, ranks: int, name: str) -> None:
    _, expected = planned(CASES[ranks, name], ranks)
    for rank in measured[ranks]:
        assert rank[name]["gathered"] == expected.gathered


@pytest.mark.parametrize("name", [name for name in ON_FOUR if "hpz" in name])
def test_hpz_gathers_in_its_own_groups(measured: Any, name: str) -> None:
    """Groups of 2 get what the plan says; over all 4 come the adapters and what persists."""
    _, expected = planned(ON_FOUR[name], 4)
    for rank in measured[4]:
        assert rank[name]["by group"][2] == expected.wire[2] * 2
        assert rank[name]["by group"][4] < expected.wire[4] * 4 / 3  # There, gradients come on top.
