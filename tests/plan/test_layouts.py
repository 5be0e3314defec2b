"""Which layouts fit, what bounds them, and the choice; against the published arithmetic of docs/planning.md."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparselora_dist.apply import apply_sparselora, find_state
from sparselora_dist.config import ConfigError, RunConfig
from sparselora_dist.plan.hardware import GPUS, Cluster, find_gpu
from sparselora_dist.plan.layouts import Layout, Plan, make_plan
from sparselora_dist.plan.shapes import find_shape, from_hf_config
from sparselora_dist.plan.storage import configured_scheme, tree_of
from sparselora_dist.plan.work import Batch, flop_model, work
from sparselora_dist.train.metrics import flop_model as loaded_flop_model
from support.models import tiny_config, tiny_lora
from support.plan_runs import SPARSE, run_data

L70 = find_shape("llama-3-70b")
# The math config, scaled to 80 layers as configs/llama3_70b_math_*.json are.
MATH: dict[str, Any] = {
    "layers": {
        "ffn": {"8-75": 0.99},
        "qk": {"35-48,53-58,63-73": 0.75},
        "vo": {"35-48,53-58,63-73": 0.75},
    }
}
BATCH = Batch(tokens=4096, context=0.75, length=4096)
CLUSTER = Cluster(gpu=GPUS["h100-80gb"], gpus=64, per_node=8)


def run_config(engine: str = "fsdp2", **run: Any) -> RunConfig:
    return RunConfig.from_dict(run_data(engine, **{"sparse": MATH, "reentrant": False, "rank": 32, **run}))


def rows(plan: Plan) -> dict[str, Layout]:
    return {layout.name: layout for layout in plan.layouts}


@pytest.fixture(scope="module")
def plan_70b() -> Plan:
    return make_plan(L70, run_config(), CLUSTER, BATCH)


@pytest.mark.parametrize(
    "name, gigabytes, seconds",
    [("fsdp2 bf16", 280, 5.6), ("fsdp2 nf4", 77, 1.5), ("hsdp bf16", 280, 0.7), ("hsdp nf4", 77, 0.19)],
)
def test_published_communication(plan_70b: Plan, name: str, gigabytes: float, seconds: float) -> None:
    """Weights alone, to two digits. The plan has (N - 1) / N on the wire, and adds some GB for the adapters and their
    gradients: at rank 32 over 64 GPUs, FSDP2 pads every lora_A to 64 rows."""
    found = rows(plan_70b)[name]
    assert found.traffic.gathered / 1e9 == pytest.approx(gigabytes, rel=0.06)
    assert found.communication == pytest.approx(seconds, rel=0.13 if name.startswith("hsdp") else 0.08)


def test_published_compute(plan_70b: Plan) -> None:
    found = rows(plan_70b)["fsdp2 bf16"]
    assert found.work.dense_flops / 450e12 == pytest.approx(4.0, rel=0.03)
    assert found.compute == pytest.approx(1.84, rel=0.03)


def test_replicated_nf4_holds_39_5_gb(plan_70b: Plan) -> None:
    found = rows(plan_70b)["replicated nf4"].bytes
    assert (found["weights"] + found["scales"]) / 1e9 == pytest.approx(39.5, rel=0.01)


@pytest.mark.parametrize("engine, layout", [("fsdp2", "hsdp bf16"), ("zero3", "zero3-hpz bf16")])
def test_70b_across_nodes_is_bound_by_communication(engine: str, layout: str) -> None:
    plan = make_plan(L70, run_config(engine), CLUSTER, BATCH)
    found = rows(plan)
    for name in ("zero3 bf16", "fsdp2 bf16"):
        assert found[name].bound == "communication" and found[name].communication > 2.5 * found[name].compute
    assert found["zero3-hpz bf16"].bound == found["hsdp bf16"].bound == "compute"
    assert plan.choice is not None and plan.choice.name == layout
    assert "compute-bound" in plan.reason and "Communication-bound: zero3 bf16" in plan.reason
    assert plan.configured is not None and plan.configured.name == f"{engine} bf16" and plan.refusal is None


def test_names_of_the_runs_own_layout() -> None:
    node = {"fsdp": {"dp_shard_size": 8}}
    cases: list[tuple[RunConfig, str]] = [
        (run_config(), "fsdp2 bf16"),
        (run_config(four_bit=True), "fsdp2 nf4"),
        (run_config(**node), "hsdp bf16"),
        (run_config(fsdp={"dp_shard_size": 1}), "replicated bf16"),
        (run_config("zero3"), "zero3 bf16"),
        (run_config("zero3", dtype="float32"), "zero3 fp32"),
    ]
    cases.append((run_config("zero3", hpz=8), "zero3-hpz bf16"))
    shape = find_shape("llama-3.2-1b")
    for config, name in cases:
        config = dataclasses.replace(config, sparse_lora=dataclasses.replace(config.sparse_lora, enabled=False))
        plan = make_plan(shape, config, CLUSTER, BATCH)
        assert plan.configured is not None and plan.configured.name == name


def test_one_node_has_no_layout_of_several() -> None:
    plan = make_plan(L70, run_config(), Cluster(gpu=GPUS["h100-80gb"], gpus=8, per_node=8), BATCH)
    assert {x.sharding for x in plan.layouts} == {"zero3", "fsdp2", "replicated"}
    assert all(x.bound == "compute" for x in plan.layouts)


def test_one_gpu_takes_one_process() -> None:
    config = run_config("single", sparse=None)
    plan = make_plan(find_shape("llama-3-8b"), config, Cluster(gpu=GPUS["h100-80gb"], gpus=1, per_node=8), BATCH)
    assert [x.name for x in plan.layouts] == ["replicated bf16", "replicated nf4"]
    assert plan.choice is plan.configured and plan.choice is not None
    assert plan.choice.communication == 0 and plan.choice.bytes["gather"] == 0


def test_a_run_that_does_not_fit_is_told_the_nearest_that_does() -> None:
    four = Cluster(gpu=GPUS["rtx4090-24gb"], gpus=8, per_node=8)
    plan = make_plan(L70, run_config(), four, Batch(tokens=1024, context=0.75, length=1024))
    assert plan.configured is not None and not plan.configured.fits
    assert plan.refusal is not None
    assert "the nearest layout that does is 'fsdp2 nf4'" in plan.refusal
    assert "quantization.load_in_4bit true" in plan.refusal


def test_nothing_fits() -> None:
    plan = make_plan(L70, run_config(), Cluster(gpu=GPUS["rtx4090-24gb"], gpus=1, per_node=8), BATCH)
    assert plan.choice is None and plan.refusal is not None
    assert "no layout fits 1 x rtx4090-24gb" in plan.refusal and "use more GPUs" in plan.refusal


def test_flops_are_those_of_the_loaded_model() -> None:
    config = RunConfig.from_dict(run_data("fsdp2", sparse=SPARSE))
    shape = from_hf_config(tiny_config().to_dict(), "tiny")
    model = apply_sparselora(tiny_lora(), config.sparse_lora)
    state = find_state(model)
    assert state is not None
    tree = tree_of(shape, config, configured_scheme(config, shape, 2))
    assert flop_model(shape, config, tree) == loaded_flop_model(model, state)


def test_memory_follows_checkpointing_and_sparsity() -> None:
    def done(**run: Any) -> Any:
        config = run_config(**run)
        return work(L70, config, tree_of(L70, config, configured_scheme(config, L70, 64)), BATCH)

    kept, recomputed, dense = done(reentrant=None), done(), done(sparse=None, reentrant=None)
    assert kept.activations > 3 * recomputed.activations
    assert dense.activations > 1.5 * kept.activations
    assert recomputed.executed_flops > kept.executed_flops
    # Without sparsity everything is dense, but the head still runs at label positions only.
    assert dense.executed_flops < dense.dense_flops
    # 1024 labels in chunks of 320: bf16 logits and their fp32 copy, and the gradient of the hidden states.
    assert dense.logits == recomputed.logits == 320 * 128256 * 6 + 1024 * 8192 * 2
    assert done(sparse=MATH | {"skip_unused_logits": False}).logits == 4096 * 128256 * 12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gpus": 0}, "'--gpus' is 0"),
        ({"gpus": 12}, "'--gpus' is 12: allowed: a multiple of --gpus-per-node"),
        ({"inter": 0.0}, "'--inter-gbps' is 0"),
    ],
)
def test_impossible_clusters(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CLUSTER, **change)


def test_unknown_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'--gpu' is 'h100': allowed: h100-80gb"):
        find_gpu("h100")
