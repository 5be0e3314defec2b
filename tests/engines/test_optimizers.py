"""Optimizers by name: each trains alike under every engine, a resumed run is the same bit for bit, refusals say why."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from sparselora_dist.config import ConfigError
from sparselora_dist.config.train import TrainSection
from sparselora_dist.engines import optimizers
from sparselora_dist.engines.optimizers import choose_optimizer, choose_under_deepspeed, fp32_moments, make_optimizer
from sparselora_dist.engines.ranks import Ranks
from sparselora_dist.engines.single import SingleEngine
from support.engine_parts import run_config
from support.harness import run_ranks
from support.optimizer_workers import CONVERSIONS, SAVED, STEPS, single

pytest.importorskip("bitsandbytes")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
# fp32, STEPS steps of up to 1e-3 each: fused kernels and shards sum in another order, and Adam's first steps divide small
# gradients by themselves. The largest seen is 7e-6.
FP32 = 3e-5
# Of the way from the saved state to the end, in the 2-norm: codes have about 1 % of error. Under ZeRO-3 blocks of 256 run
# over the ends of parameters whose gradients differ in size. Seen: 0.016 and 0.09.
EIGHT_BIT = {"single": 0.04, "fsdp2": 0.04, "zero3": 0.2}
Runs = list[dict[str, Any]]


@pytest.fixture(scope="module")
def one() -> Runs:
    return [single()]


@pytest.fixture(scope="module")
def fsdp2_runs(one: Runs) -> Runs:
    return run_ranks("support.optimizer_workers:sharded", 2, "fsdp2", one[0]["adamw_8bit"]["halfway"])


@pytest.fixture(scope="module")
def zero3_runs(one: Runs) -> Runs:
    return run_ranks("support.optimizer_workers:sharded", 2, "zero3", one[0]["adamw_8bit"]["halfway"])


@pytest.fixture(params=["single", "fsdp2", "zero3"])
def runs(request: pytest.FixtureRequest) -> tuple[str, Runs]:
    name = request.param
    return name, request.getfixturevalue("one" if name == "single" else f"{name}_runs")


def distance(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Between parameters, in the 2-norm."""
    ours, theirs = left["parameters"], right["parameters"]
    assert ours.keys() == theirs.keys()
    return sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours) ** 0.5


def largest(left: dict[str, Any], right: dict[str, Any]) -> float:
    ours, theirs = left["parameters"], right["parameters"]
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_identical(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["steps"] == right["steps"]
    for kind in ("parameters", "moments", "codes"):
        assert left[kind].keys() == right[kind].keys(), kind
        assert all(torch.equal(value, right[kind][name]) for name, value in left[kind].items()), kind


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_resume_is_bit_equal(runs: tuple[str, Runs], optim: str) -> None:
    """Parameters, moments, codes and losses of STEPS steps are those of SAVED steps and the rest resumed."""
    for rank in runs[1]:
        whole, resumed = rank[optim], rank[optim]["resumed"]
        assert whole["halfway"]["steps"] == SAVED and whole["end"]["steps"] == STEPS
        assert resumed["exact"]
        assert_identical(whole["halfway"], resumed["loaded"])
        assert whole["losses"][SAVED:] == resumed["losses"]
        assert_identical(whole["end"], resumed["end"])
        assert largest(whole["halfway"], whole["end"]) > 1e-3


def test_fused_is_plain(runs: tuple[str, Runs], one: Runs) -> None:
    plain = one[0]["adamw_torch"]
    for rank in runs[1]:
        fused = rank["adamw_torch_fused"]
        assert fused["kind"] == "AdamW" and fused["end"]["codes"] == {}
        assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert largest(plain["end"], fused["end"]) < FP32


def test_8bit_is_close_to_fp32(runs: tuple[str, Runs], one: Runs) -> None:
    name, ranks = runs
    plain = one[0]["adamw_torch"]
    way = distance(plain["halfway"], plain["end"])
    for rank in ranks:
        coded = rank["adamw_8bit"]
        assert coded["kind"] == "AdamW8bit"
        assert coded["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert 0 < distance(plain["end"], coded["end"]) < EIGHT_BIT[name] * way


def test_8bit_is_8bit(runs: tuple[str, Runs]) -> None:
    """Codes of a byte with a scale per 256, of every tensor of 4096 elements and more that is stepped."""
    name, ranks = runs
    for rank in ranks:
        state = rank["adamw_8bit"]["halfway"]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state["codes"].items():
            parts.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value
        for own in parts.values():
            for number in (1, 2):
                assert own[f"state{number}"].dtype == torch.uint8 and own[f"state{number}"].numel() >= 4096
                assert own[f"absmax{number}"].numel() == -(-own[f"state{number}"].numel() // 256)
        if name == "zero3":
            assert parts.keys() == {"flat.0"}
        else:
            # 3 layers: A and B of q and o, A of k and v. Their B have 32 rows.
            assert len(parts) == 18
            assert not any("k_proj.lora_B" in key or "v_proj.lora_B" in key for key in parts)
        assert len(state["moments"]) == 2 * len(state["parameters"])
        assert all(value.dtype == torch.float32 for value in state["moments"].values())


@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
def test_another_optimizer_continues(one: Runs, source: str, target: str) -> None:
    seen, start = one[0][f"{source} to {target}"], one[0][source]["halfway"]
    assert seen["exact"] == (target != "adamw_8bit")
    if seen["exact"]:
        assert_identical(start | {"codes": {}}, seen["loaded"])
    plain = one[0]["adamw_torch"]
    limit = EIGHT_BIT["single"] * distance(plain["halfway"], plain["end"])
    assert distance(plain["end"], seen["end"]) < limit
    assert seen["end"]["steps"] == STEPS


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_8bit_moves_to_another_number_of_ranks(name: str, one: Runs, request: pytest.FixtureRequest) -> None:
    plain, start = one[0]["adamw_torch"], one[0]["adamw_8bit"]["halfway"]
    for rank in request.getfixturevalue(f"{name}_runs"):
        seen = rank["from single"]
        assert not seen["exact"] and seen["loaded"]["steps"] == SAVED
        assert all(torch.equal(value, seen["loaded"]["parameters"][key]) for key, value in start["parameters"].items())
        assert distance(plain["end"], seen["end"]) < EIGHT_BIT[name] * distance(plain["halfway"], plain["end"])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_the_loss_falls_alike(one: Runs, optim: str) -> None:
    plain, other = one[0]["learns"]["adamw_torch"], one[0]["learns"][optim]
    assert plain[-1] < 0.7 * plain[0]
    assert other[-1] == pytest.approx(plain[-1], rel=0.05)


# --- names and refusals -----------------------------------------------------------------------------------------------


def section(optim: str | None, **values: Any) -> TrainSection:
    return TrainSection(output_dir="out", optim=optim, **values)


def test_the_default_follows_the_device() -> None:
    assert choose_optimizer(section(None), CPU) == "adamw_torch"
    assert choose_optimizer(section(None), GPU) == "adamw_torch_fused"
    assert choose_optimizer(section("adamw_torch"), GPU) == "adamw_torch"
    assert choose_under_deepspeed(section(None), {}, GPU) == "adamw_torch_fused"
    # What is offloaded is stepped on the host.
    offloaded = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert choose_under_deepspeed(section(None), offloaded, GPU) == "adamw_torch"
    assert choose_under_deepspeed(section(None), {"optimizer": {"type": "Adam"}}, GPU) == "deepspeed Adam"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_the_section_reaches_the_optimizer(optim: str) -> None:
    values = {
        "learning_rate": 0.25,
        "adam_beta1": 0.5,
        "adam_beta2": 0.75,
        "adam_epsilon": 0.125,
        "weight_decay": 0.0625,
    }
    made = make_optimizer(optim, [torch.nn.Parameter(torch.zeros(3))], section(optim, **values))
    (group,) = made.param_groups
    assert tuple(group["betas"]) == (0.5, 0.75)
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.25, 0.125, 0.0625)
    assert bool(group.get("fused")) == (optim == "adamw_torch_fused")
    assert getattr(made, "is_paged", False) == (optim == "paged_adamw_8bit")


def test_no_state_has_no_moments() -> None:
    assert fp32_moments({}) == {}


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"train\.optim.*adamw_8bits.*did you mean \"adamw_8bit\""):
        section("adamw_8bits")


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_without_bitsandbytes(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ValueError, match=rf"'{optim}'.*pip install 'sparselora-dist\[quantization\]'"):
        SingleEngine(run_config("single", optim=optim), Ranks())


def test_paged_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"'paged_adamw_8bit'.*unified memory.*on the CPU: use 'adamw_8bit'"):
        choose_optimizer(section("paged_adamw_8bit"), CPU)


def test_a_bitsandbytes_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operation, key: key != "CPU")
    assert choose_optimizer(section("adamw_8bit"), GPU) == "adamw_8bit"
    with pytest.raises(ValueError, match=r"'adamw_8bit'.*has no 8-bit AdamW for the CPU: pip install -U bitsandbytes"):
        choose_optimizer(section("adamw_8bit"), CPU)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_two_optimizers_contradict(optim: str) -> None:
    with pytest.raises(ValueError, match=rf"'{optim}' and 'engine\.deepspeed\.optimizer\.type' is 'Adam': remove one"):
        choose_under_deepspeed(section(optim), {"optimizer": {"type": "Adam"}}, CPU)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_8bit_is_not_offloaded(device: str) -> None:
    ds = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    with pytest.raises(ValueError, match=r"'adamw_8bit'.*offload_optimizer.*remove"):
        choose_under_deepspeed(section("adamw_8bit"), ds, GPU)
