"""Equalities 4 and 5: any engine, number of ranks and kind of checkpointing trains as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist.io.prequantized import planned as in_files
from sparselora_dist.plan.shapes import from_hf_config
from sparselora_dist.plan.storage import resident_bytes
from support.agreement_workers import CASES, IN_CHUNKS, ON_FOUR, STEPS
from support.compare import assert_close
from support.experts_workers import FP8, STORAGES, moe_config, run
from support.experts_workers import GROUPS as EXPERT_GROUPS
from support.small_floats import KINDS

# fp32 sums in another order, STEPS steps of up to 1e-2 each.
PARAMETERS = {"rtol": 1e-5, "atol": 1e-6}
LOSS = 2e-6
_FACTORS = {f"estimator.{name}_{side}" for name in ("gate", "up") for side in "ab"}
STORED = {
    "float32": _FACTORS | {"gate_up_proj.rows", "down_proj.rows"},
    "nf4": _FACTORS | {f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in ("codes", "scales")},
    "fp8": _FACTORS | {f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in ("rows", "scales")},
}


GROUPS_OF = {0: {"ffn", "vo"}, 1: {"ffn", "qk", "vo"}, 2: {"qk"}}


def assert_same_run(reference: dict[str, Any], got: dict[str, Any], groups_of: dict[int, set[str]] = GROUPS_OF) -> None:
    assert got["loss"] == pytest.approx(reference["loss"], rel=LOSS)
    assert got["norm"] == pytest.approx(reference["norm"], rel=1e-5)
    for step in range(STEPS):
        assert_same_masks(reference["masks"][step], got["masks"][step], step, groups_of)
    # Adam's first mean is the gradient of the first step: every trained parameter has one, and they agree.
    assert got["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        assert gradient.abs().max() > 1e-6, name
        assert_close(f"gradient {name}", gradient, got["gradients"][name], rtol=1e-4, atol=1e-5 * gradient.abs().max())
    assert len(got["parameters"]) == STEPS + 1
    for step, (expected, parameters) in enumerate(zip(reference["parameters"], got["parameters"])):
        assert parameters.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(f"step {step} {name}", value, parameters[name], **PARAMETERS)


def assert_same_masks(reference: Any, got: Any, step: int, groups_of: dict[int, set[str]] = GROUPS_OF) -> None:
    groups = {layer: set(chosen) for layer, chosen in reference.items()}
    assert groups == groups_of
    assert {layer: set(chosen) for layer, chosen in got.items()} == groups
    for layer, chosen in reference.items():
        for group, kept in chosen.items():
            assert torch.equal(kept, got[layer][group]), (step, layer, group)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(single: Any, sharded: Any, case: str) -> None:
    for rank in sharded:
        assert_same_run(single[0]["agreement"][case], rank["agreement"][case])


@pytest.mark.parametrize("case", IN_CHUNKS)
def test_two_ranks_evaluate_as_one_process(single: Any, sharded: Any, case: str) -> None:
    loss, right, labels = single[0]["agreement"][case]["evaluated"]
    assert loss > 0 and labels > 20
    for rank in sharded:
        assert rank["agreement"][case]["evaluated"] == [pytest.approx(loss, rel=1e-5), right, labels]


def test_the_loss_in_chunks_trains_alike(single: Any) -> None:
    runs = single[0]["agreement"]
    assert_same_run(runs["llama"], runs["loss in chunks"])


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_ranks_are_one_process(single: Any, on_four: Any, case: str) -> None:
    """Masks are chosen while weights are gathered, in another group: a wrong order would wait for ever."""
    for rank in on_four:
        assert_same_run(single[0]["agreement"][case], rank[case])


def test_the_reference_trains(single: Any) -> None:
    """The comparison is not one of runs that stand still, or whose masks never change."""
    for case in CASES:
        run = single[0]["agreement"][case]
        first, last = run["parameters"][0], run["parameters"][-1]
        assert all((first[name] - last[name]).abs().max() > 100 * PARAMETERS["atol"] for name in first), case
        assert any(not torch.equal(run["masks"][0][layer]["ffn"], run["masks"][1][layer]["ffn"]) for layer in range(2))
    runs = single[0]["agreement"]
    assert runs["all linear"]["loss"] != pytest.approx(runs["all linear, lora_branch dense"]["loss"], rel=10 * LOSS)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(engine: Any, kind: str) -> None:
    for rank in engine:
        assert_same_run(rank["agreement"]["llama"], rank["agreement"][kind])


@pytest.mark.parametrize("storage", STORAGES)
def test_routed_experts(single: Any, sharded: Any, storage: str) -> None:
    """Streamed into shards, sparse, with adapters on attention and on the experts' parameters."""
    reference = single[0]["experts"][storage]
    changing = [steps[1]["experts"] for steps in reference["run"]["masks"]]
    assert any(not torch.equal(changing[0], later) for later in changing[1:])
    assert any("experts" in name for name in reference["run"]["gradients"])
    for rank in sharded:
        seen = rank["experts"][storage]
        assert_same_run(reference["run"], seen["run"], EXPERT_GROUPS)
        stored = {name: p for name, p in seen["held"].items() if ".experts." in name and not p["trainable"]}
        assert {name.rsplit(".experts.", 1)[1].replace("base_layer.", "") for name in stored} == STORED[storage]
        assert all(p["sharded"] for p in stored.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_bytes_of_experts_are_as_planned(
    request: pytest.FixtureRequest, name: str, storage: str, tmp_path: Path
) -> None:
    config, stored = run(name, storage), None
    if storage == "fp8":
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": KINDS[FP8].settings}))
        found = in_files(tmp_path, config.model, config.quantization)
        assert found
        stored = found[1]
    planned = resident_bytes(from_hf_config(moe_config().to_dict(), "tiny"), config, 2, stored=stored)
    for kind in ("weights", "scales", "factors", "lora", "optimizer"):
        fullest = max(rank["experts"][storage]["bytes"][kind] for rank in request.getfixturevalue(name))
        assert (fullest == 0) == (planned[kind] == 0), kind
        assert abs(planned[kind] - fullest) <= 0.02 * fullest, (kind, planned[kind], fullest)


def test_a_model_loaded_partitioned(zero3: Any) -> None:
    for rank in zero3:
        seen = rank["loaded partitioned"]
        assert seen["partitioned"]
        # The factors and the transposed weights were partitioned at once, before deepspeed.initialize.
        assert seen["not partitioned"] == []
        assert_same_run(rank["agreement"]["llama"], seen["run"])
        assert [name for name, p in seen["held"].items() if p["trainable"]] == seen["names"]
        assert all(p["sharded"] for p in seen["held"].values())


def test_an_engines_model_is_refused_with_the_remedy(sharded: Any, fsdp2: Any) -> None:
    for rank in sharded:
        message = rank["sharding"]["remove"]
        assert "an engine has sharded them" in message and "load it on the plain base model" in message, message
    for rank in fsdp2:
        message = rank["apply after"]
        assert "already sharded by FSDP2" in message and "before fully_shard" in message, message
