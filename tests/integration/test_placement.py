"""Ranks that their launcher deals to hosts in turn, and pods: what trains is the same, and groups stay on their hosts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparselora_dist.engines import hosts as module
from sparselora_dist.engines.hosts import Place, by_host, check_groups, exchange
from sparselora_dist.engines.ranks import free_port
from support.placed_workers import start
from support.trainer_workers import observe

from .conftest import Tiny

IDS = torch.arange(3, 19).reshape(1, 16)


def slurm(rank: int, node: int, port: int) -> dict[str, str]:
    """Task ``rank`` of four on two nodes, as ``srun -N 2 -n 4 --distribution=cyclic`` starts it."""
    return {
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
        **{"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": str(rank)},
        **{"SLURM_NODEID": str(node), "SLURM_LOCALID": str(rank // 2), "SPARSELORA_NODE": f"n{node + 1}"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


@pytest.fixture(scope="module")
def placed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """HSDP and hpZ in groups of two, by four tasks of Slurm that go to two hosts in turn; what each task saw."""
    folder = tmp_path_factory.mktemp("placed")
    engines = {
        "fsdp2": {"fsdp": {"fsdp_version": 2, "dp_shard_size": 2}},
        "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}},
    }
    train = {"max_steps": 4, "per_device_train_batch_size": 1, "save_steps": None}
    jobs = [tiny.config(name, folder / name, train=train) for name in engines]
    for job in jobs:
        job["engine"] |= engines[job["engine"]["name"]]
    torch.save(jobs, folder / "jobs.pt")
    port = free_port()
    start(["-m", "support.placed_workers", str(folder)], [slurm(rank, rank % 2, port) for rank in range(4)])
    return folder, [torch.load(folder / f"{task}.pt", weights_only=False) for task in range(4)]


@pytest.mark.parametrize("job", [0, 1])
def test_a_shard_group_is_on_one_host(job: int, placed: tuple[Path, list]) -> None:
    tasks = [seen[job] for seen in placed[1]]
    # Tasks 0 and 2 are on the first host, 1 and 3 on the second.
    assert [task["rank"] for task in tasks] == [0, 2, 1, 3]
    assert [task["group"] for task in tasks] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert {task["hosts"] for task in tasks} == {("n1", "n1", "n2", "n2")}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_losses_do_not_depend_on_the_mapping(
    engine: str, placed: tuple[Path, list], tiny: Tiny, tmp_path: Path, rows_of: Callable, alone: None
) -> None:
    train = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": None}
    observe(tiny.config("single", tmp_path / "single", train=train), IDS)
    expected, got = rows_of(tmp_path / "single"), rows_of(placed[0] / engine)
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_pods_of_an_indexed_job(tiny: Tiny, tmp_path: Path, placed: tuple[Path, list], rows_of: Callable) -> None:
    """RANK and WORLD_SIZE, and nothing of which process this is on its host: ZeRO-3 trains as one job."""
    train = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": None}
    config = tiny.config_file(tmp_path / "run.json", "zero3", tmp_path / "out", train=train)
    port = str(free_port())
    pods = [
        {
            "JOB_COMPLETION_INDEX": str(i),
            "RANK": str(i),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        for i in range(2)
    ]
    outputs = start(
        ["launch/train.py", "--config", config], [pod | {"SPARSELORA_NODE": f"pod{i}"} for i, pod in enumerate(pods)]
    )
    assert f"2 ranks on 2 host(s) by Kubernetes, meeting at localhost:{port}" in outputs[0]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["world_size"] == 2
    expected = [row["loss"] for row in rows_of(placed[0] / "zero3")]
    assert [row["loss"] for row in rows_of(tmp_path / "out")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("hosts", "order"),
    [
        ("aabb", [0, 1, 2, 3]),
        ("abab", [0, 2, 1, 3]),
        ("baab", [0, 3, 1, 2]),
        ("abcabc", [0, 3, 1, 4, 2, 5]),
        ("aba", [0, 2, 1]),
    ],
)
def test_ranks_are_numbered_host_by_host(hosts: str, order: list[int]) -> None:
    assert by_host([Place(rank, host) for rank, host in enumerate(hosts)]) == order


@pytest.mark.parametrize(
    ("hosts", "size"), [("aabb", 2), ("aaaabb", 2), ("aabbccdd", 4), ("aabb", 4), ("aaab", 1), ("ab", 2)]
)
def test_groups_that_can_be_formed(hosts: str, size: int) -> None:
    check_groups(list(hosts), size, "key")


@pytest.mark.parametrize(("hosts", "size"), [("aaab", 2), ("aaabbb", 2), ("aaaabb", 3), ("abbc", 2)])
def test_groups_that_cannot(hosts: str, size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"'fsdp.size' is {size}, .* across hosts \(a has {hosts.count('a')}, b has .*same number"
    ):
        check_groups(list(hosts), size, "fsdp.size")


def test_ranks_that_have_not_begun_are_named_while_the_others_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    store = dist.HashStore()
    store.set("host/3", b"b/0")
    said = r"2 of 4 ranks have begun \(1 on a, 1 on b\); for \d+ s not rank 0, 2"
    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError, match=f"{said}: see what its launcher says"):
        exchange(store, Place(1, "a/0"), 4, 0.4)
    assert caplog.records and all("train.ddp_timeout" in line.getMessage() for line in caplog.records)
    # The first of those that have begun says so while it waits; the others are silent.
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError, match=said):
        exchange(store, Place(3, "b/0"), 4, 0.4)
    assert not caplog.records
    store.set("host/0", b"a/0")
    store.set("host/2", b"b/0")
    assert [place.host for place in exchange(store, Place(1, "a/0"), 4, 0.4)] == ["a/0", "a/0", "b/0", "b/0"]
