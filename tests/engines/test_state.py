"""State as whole tensors: round trips, moves between engines, clipping, accumulation; and the engines' settings."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from sparselora_dist.config import RunConfig
from sparselora_dist.engines.ranks import Ranks, discover_ranks, start_distributed
from sparselora_dist.engines.single import SingleEngine
from sparselora_dist.engines.zero3 import resolve_auto
from support.compare import assert_close
from support.engine_parts import run_config
from support.state_workers import VARIANTS, State

# --- state ------------------------------------------------------------------------------------------------------------


def assert_identical(expected: State, got: State) -> None:
    for kind, (left, right) in enumerate(zip(expected[:2], got[:2])):
        assert left.keys() == right.keys(), kind
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
    assert expected[2] == got[2]


def assert_near(expected: State, got: State) -> None:
    assert expected[2] == got[2]
    for left, right in zip(expected[:2], got[:2]):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert_close(name, value, right[name], rtol=1e-4, atol=1e-6)


def test_the_sizes_do_not_divide(engine: Any) -> None:
    parameters, moments, steps = engine[0]["state"]["kept"]
    assert sum(value.numel() % 2 for value in parameters.values()) > 5
    assert steps == 2 and len(moments) == 2 * len(parameters)
    assert all(moments[f"{name}.exp_avg"].shape == value.shape for name, value in parameters.items())
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (*parameters.values(), *moments.values()))


def test_fresh_state(single: Any, engine: Any) -> None:
    parameters, moments, steps = engine[0]["state"]["fresh"]
    assert (moments, steps) == ({}, 0)
    assert_identical(single[0]["state"]["fresh"], (parameters, moments, steps))


def test_round_trip_in_place(engine: Any) -> None:
    for rank in engine:
        seen = rank["state"]
        assert_identical(seen["kept"], seen["state"])
        assert_identical(seen["kept"], seen["back"])


def test_ranks_give_the_same_state(sharded: Any) -> None:
    assert_identical(sharded[0]["state"]["kept"], sharded[1]["state"]["kept"])


def test_moving_between_engines(single: Any, zero3: Any, fsdp2: Any) -> None:
    """ZeRO-3 for two steps, FSDP2 for one, one process for one: as one process alone."""
    start = zero3[0]["state"]
    for rank in (*zero3, *fsdp2):
        assert_identical(start["kept"], rank["moved"]["loaded"])
    assert_identical(start["kept"], single[0]["reference"]["loaded"])
    assert_identical(fsdp2[0]["moved"]["state"], single[0]["moved"]["loaded"])
    third, fourth = single[0]["reference"]["losses"]
    assert [start["next"], *zero3[0]["moved"]["losses"]] == pytest.approx([third] * 2, rel=1e-6)
    assert fsdp2[0]["moved"]["losses"] == pytest.approx([third], rel=1e-6)
    assert single[0]["moved"]["losses"] == pytest.approx([fourth], rel=1e-6)
    assert_near(start["after next"], zero3[0]["moved"]["state"])
    assert_near(start["after next"], fsdp2[0]["moved"]["state"])
    assert_near(single[0]["reference"]["state"], single[0]["moved"]["state"])


def test_a_loaded_engine_repeats_the_step_bit_for_bit(zero3: Any) -> None:
    """The same engine at the same number of ranks, started anew."""
    assert zero3[0]["moved"]["losses"] == [zero3[0]["state"]["next"]]
    assert_identical(zero3[0]["state"]["after next"], zero3[0]["moved"]["state"])


@pytest.mark.parametrize("label", VARIANTS)
def test_clipping_and_accumulation_agree(single: Any, sharded: Any, label: str) -> None:
    expected = single[0]["variants"][label]
    for rank in sharded:
        got = rank["variants"][label]
        assert got["count"] == expected["count"] == 2
        for left, right in zip(expected["steps"], got["steps"]):
            assert right == pytest.approx(left, rel=2e-6)
        for name, value in expected["parameters"].items():
            assert_close(name, value, got["parameters"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("one", "two"), [("whole", "parts"), ("clipped", "clipped parts")])
def test_accumulation_is_one_larger_batch(engine: Any, one: str, two: str) -> None:
    left, right = engine[0]["variants"][one], engine[0]["variants"][two]
    for expected, got in zip(left["steps"], right["steps"]):
        assert got == pytest.approx(expected, rel=2e-6)
    for name, value in left["parameters"].items():
        assert_close(name, value, right["parameters"][name], rtol=1e-5, atol=1e-6)


def test_clipping_clips(engine: Any) -> None:
    whole, clipped = engine[0]["variants"]["whole"], engine[0]["variants"]["clipped"]
    # The norm that is reported is the one before clipping.
    assert clipped["steps"][0] == pytest.approx(whole["steps"][0], rel=1e-6) and whole["steps"][0][1] > 1
    assert any((p - clipped["parameters"][name]).abs().max() > 1e-3 for name, p in whole["parameters"].items())


# --- DeepSpeed's "auto" -----------------------------------------------------------------------------------------------

AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "train_batch_size": 24,
    "gradient_clipping": 0.7,
    "bf16.enabled": True,
    "fp16.enabled": False,
    "optimizer.params.lr": 3e-4,
    "optimizer.params.betas": [0.8, 0.99],
    "optimizer.params.eps": 1e-7,
    "optimizer.params.weight_decay": 0.1,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_max_lr": 3e-4,
    "scheduler.params.warmup_num_steps": 6,
    "scheduler.params.total_num_steps": 101,
    "zero_optimization.reduce_bucket_size": 4096,
    "zero_optimization.stage3_prefetch_bucket_size": 3686,
    "zero_optimization.stage3_param_persistence_threshold": 640,
}


def resolved(ds: dict[str, Any], dtype: str = "bfloat16", **train: Any) -> dict[str, Any]:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 3e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.1,
        "max_grad_norm": 0.7,
        "warmup_ratio": 0.05,
    }
    return resolve_auto(ds, run_config("zero3", dtype, **(settings | train)), world_size=4, hidden_size=64, steps=101)


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def lookup(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


@pytest.mark.parametrize("path", AUTO)
def test_auto(path: str) -> None:
    given = nested(path, "auto")
    assert lookup(resolved(given), path) == AUTO[path]
    assert given == nested(path, "auto"), "the caller's own dict was changed"


def test_auto_of_precision_and_warm_up() -> None:
    assert resolved(nested("bf16.enabled", "auto"), "float32")["bf16"]["enabled"] is False
    path = "scheduler.params.warmup_num_steps"
    assert lookup(resolved(nested(path, "auto"), warmup_steps=9), path) == 9


def test_what_is_left_out_is_filled_in() -> None:
    got = resolved({})
    assert got["zero_optimization"]["stage"] == 3 and got["bf16"] == {"enabled": True}
    assert (got["train_batch_size"], got["gradient_clipping"]) == (24, 0.7)
    assert "bf16" not in resolved({}, "float32")
    kept = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": 0.7, "steps_per_print": 5}
    got = resolved(kept)
    assert got["zero_optimization"]["overlap_comm"] is True
    assert (got["gradient_clipping"], got["steps_per_print"]) == (0.7, 5)


@pytest.mark.parametrize("path", ["zero_optimization.sub_group_size", "optimizer.type", "train_batch", "a.b.c"])
def test_auto_without_a_rule_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=rf"'engine\.deepspeed\.{path}' is \"auto\", which has no rule") as caught:
        resolved(nested(path, "auto"))
    assert "zero_optimization.reduce_bucket_size" in str(caught.value)


@pytest.mark.parametrize(
    ("ds", "dtype", "words"),
    [
        ({"train_batch_size": 8}, "bfloat16", ("engine.deepspeed.train_batch_size' is 8", "make it 24", '"auto"')),
        ({"train_micro_batch_size_per_gpu": 1}, "bfloat16", ("train_micro_batch_size_per_gpu' is 1", "make it 2")),
        ({"gradient_accumulation_steps": 1}, "bfloat16", ("gradient_accumulation_steps' is 1", "make it 3")),
        ({"gradient_clipping": 0.2}, "bfloat16", ("gradient_clipping' is 0.2", "make it 0.7")),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 7.0}}},
            "bfloat16",
            ("optimizer.params.lr' is 7.0", '"auto"'),
        ),
        ({"bf16": {"enabled": False}}, "bfloat16", ("model.dtype 'bfloat16'", "bf16.enabled")),
        ({"bf16": {"enabled": True}}, "float32", ("model.dtype 'float32'", "bf16.enabled")),
        ({"fp16": {"enabled": True}}, "float32", ("model.dtype 'float32'", "remove fp16")),
    ],
)
def test_contradictions_are_refused(ds: dict[str, Any], dtype: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        resolved(ds, dtype)
    assert all(word in str(caught.value) for word in words), caught.value


# --- ranks ------------------------------------------------------------------------------------------------------------

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"),
)


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in RANK_VARIABLES:
        # Set and deleted, so that what the code sets is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


class FakeComm:
    def __init__(self, rank: int, size: int, local: tuple[int, int]) -> None:
        self.rank, self.size, self.local = rank, size, local

    def Split_type(self, kind: object) -> FakeComm:
        return FakeComm(*self.local, self.local)

    def bcast(self, value: Any) -> Any:
        return value or ("first-host", 23456)


def fake_mpi(env: pytest.MonkeyPatch, rank: int, size: int, local: tuple[int, int]) -> None:
    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(COMM_WORLD=FakeComm(rank, size, local), COMM_TYPE_SHARED=0)  # type: ignore[attr-defined]
    env.setitem(sys.modules, "mpi4py", module)


def set_all(env: pytest.MonkeyPatch, **values: Any) -> None:
    for name, value in values.items():
        env.setenv(name, str(value))


def test_alone(env: pytest.MonkeyPatch) -> None:
    assert discover_ranks() == Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)


def test_torchrun(env: pytest.MonkeyPatch) -> None:
    set_all(env, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    assert discover_ranks() == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)


def test_deepspeed_launcher(env: pytest.MonkeyPatch) -> None:
    set_all(env, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_SIZE=4)
    assert discover_ranks().local_world_size == 4
    env.delenv("LOCAL_SIZE")
    assert discover_ranks().local_world_size == 8


@pytest.mark.parametrize("variable", ["PMI_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"])
def test_mpirun(env: pytest.MonkeyPatch, variable: str) -> None:
    import os

    fake_mpi(env, 3, 4, (1, 2))
    env.setattr("socket.getaddrinfo", lambda host, port: [])
    set_all(env, **{variable: 1})
    assert discover_ranks() == Ranks(rank=3, local_rank=1, world_size=4, local_world_size=2)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("3", "4", "1")
    # Two nodes: every rank goes to the first rank's host and port.
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("first-host", "23456")
    # A second call finds the variables that the first one set.
    env.setitem(sys.modules, "mpi4py", None)
    assert discover_ranks().rank == 3


def test_mpirun_on_one_node(env: pytest.MonkeyPatch) -> None:
    import os

    fake_mpi(env, 1, 2, (1, 2))
    set_all(env, PMI_RANK=1, MASTER_PORT=1234)
    assert discover_ranks() == Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "1234")


def test_mpirun_without_mpi4py(env: pytest.MonkeyPatch) -> None:
    env.setitem(sys.modules, "mpi4py", None)
    set_all(env, PMI_RANK=0)
    with pytest.raises(RuntimeError, match="pip install mpi4py"):
        discover_ranks()


def test_a_launcher_of_another_kind(env: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="MASTER_PORT is not set: start with torchrun, deepspeed or mpirun"):
        start_distributed(Ranks(rank=0, world_size=2), 10.0)


def test_single_refuses_several_processes() -> None:
    config: RunConfig = run_config("single")
    with pytest.raises(ValueError, match="one process, but 2 were started: use 'zero3' or 'fsdp2'"):
        SingleEngine(config, Ranks(rank=1, world_size=2))
