"""Which GPU a process takes, and who is refused. There is none here: torch.cuda is a stand-in."""

from __future__ import annotations

import os
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparselora_dist import process
from sparselora_dist.engines.ranks import Ranks, local_device, refuse_shared_gpus
from sparselora_dist.engines.single import SingleEngine
from support.engine_parts import run_config


def gpus(env: pytest.MonkeyPatch, visible: int) -> list[int]:
    """``visible`` GPUs; the ones that were made current."""
    current: list[int] = []
    env.setattr(torch.cuda, "is_available", lambda: visible > 0)
    env.setattr(torch.cuda, "device_count", lambda: visible)
    env.setattr(torch.cuda, "set_device", current.append)
    return current


def launched(env: pytest.MonkeyPatch, local_rank: int, local_world_size: int) -> Ranks:
    env.setenv("LOCAL_RANK", str(local_rank))
    return Ranks(local_rank, local_rank, local_world_size, local_world_size)


@pytest.mark.parametrize(
    ("visible", "local_rank", "ranks", "index"), [(8, 3, 8, 3), (8, 1, 2, 1), (1, 0, 1, 0), (1, 3, 4, 0)]
)
def test_each_rank_takes_its_gpu(
    visible: int, local_rank: int, ranks: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is Slurm's and MPI's way: a rank sees its own GPU and no other."""
    current = gpus(monkeypatch, visible)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(local_rank))
    device = local_device(launched(monkeypatch, local_rank, ranks))
    assert device == torch.device("cuda", index) and current == [index]
    # What DeepSpeed reads; it refuses two that differ.
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(index)


@pytest.mark.parametrize(("local_ranks", "said", "expected"), [(1, None, 6), (2, None, 3), (8, None, 1), (2, "4", 1)])
def test_cores_are_shared_out(
    local_ranks: int, said: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing says how many threads a process has; the last is told by OMP_NUM_THREADS, which OpenMP reads itself."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert torch.get_num_threads() == 1
    try:
        SingleEngine(run_config("single"), Ranks(local_world_size=local_ranks))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current = gpus(monkeypatch, 0)
    assert local_device(launched(monkeypatch, 3, 4)) == torch.device("cpu") and current == []
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("local_rank", [0, 3])
def test_more_ranks_than_gpus(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks refuse, also those that would have one."""
    current = gpus(monkeypatch, 2)
    with pytest.raises(
        ValueError, match=r"4 ranks .* 2 visible GPUs: start at most 2 .*nproc-per-node 2.*ACCELERATOR=cpu"
    ):
        local_device(launched(monkeypatch, local_rank, 4))
    assert current == []


def test_an_engine_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    assert SingleEngine(run_config("single"), Ranks(local_rank=2)).device == torch.device("cuda", 2)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")], None),
        (
            [("a", "0"), ("a", "0")],
            r"2 ranks were started on a for 1 GPU\(s\), and ranks 0, 1 have the same one: .* most 1",
        ),
        ([("a", "0"), ("b", "0"), ("b", "1"), ("b", "1")], r"3 ranks .* on b for 2 GPU\(s\), and ranks 2, 3 .* most 2"),
    ],
)
def test_two_ranks_with_one_gpu(
    places: list[tuple[str, str]], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each rank sees one GPU, only the GPUs' own names tell whether it is the same."""

    def gather(out: list[Any], mine: tuple[str, str], group: None = None) -> None:
        assert mine == (places[0][0], places[0][1])
        out[:] = places

    monkeypatch.setattr("socket.gethostname", lambda: places[0][0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=places[0][1]))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(places))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    if told is None:
        refuse_shared_gpus()
        return
    with pytest.raises(ValueError, match=told):
        refuse_shared_gpus()


@pytest.mark.parametrize(("accelerator", "seen"), [("cpu", ""), ("cuda", "0,1"), (None, "0,1")])
def test_deepspeed_on_the_cpu_means_all(accelerator: str | None, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher shows its ranks GPUs 0,1 whatever the user has hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    process.keep_to_cpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_the_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"
