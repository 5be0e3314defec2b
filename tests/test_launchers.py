"""Every launcher's variables, as they were seen in processes that it started, and what is half given."""

from __future__ import annotations

from typing import Any

import pytest

from sparselora_dist.launchers import LaunchError, Start, find_start, spread

TORCHRUN = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    **{"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a", "MASTER_PORT": "29400"},
}
DEEPSPEED = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
    **{"MASTER_ADDR": "a", "MASTER_PORT": "29500"},
}
# Slurm 22.05: sbatch -N2 -n4, its batch script; a task of srun in it, and with --mpi=pmi2; shells of salloc.
BATCH = {
    **{"SLURM_JOB_ID": "2", "SLURM_JOB_NODELIST": "node[03-04]", "SLURM_NODELIST": "node[03-04]", "SLURM_NNODES": "2"},
    **{"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "3,1", "SLURM_PROCID": "0"},
    **{"SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}
SRUN = BATCH | {
    **{"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_NUM_TASKS": "4"},
    **{"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
}
PMI2 = SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "13"}
SALLOC = {name: value for name, value in BATCH.items() if name not in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")}
INTERACTIVE = BATCH | {
    **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node03"},
    **{"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PTY_PORT": "42625"},
}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# mpirun in an allocation starts its proxies, one a node, by srun: what it starts inherits their variables.
PROXY = SRUN | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MASTER = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
POD = {"JOB_COMPLETION_INDEX": "1"}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    assert set(names) <= set(env)
    return {name: value for name, value in env.items() if name not in names}


BY_TORCHRUN = Start("torchrun", 5, 8, 1, 4, "a", 29400)
SLURM_PORT = 15000 + 2 * 7


def by_srun(rank: int, world: int, local: int, here: int, address: str = "node03", port: int = SLURM_PORT) -> Start:
    return Start("Slurm (srun)", rank, world, local, here, address, port)


@pytest.mark.parametrize(
    ("env", "start"),
    [
        ({}, Start()),
        ({"RANK": "", "WORLD_SIZE": ""}, Start()),
        ({"WORLD_SIZE": "1"}, Start()),
        (TORCHRUN, BY_TORCHRUN),
        (DEEPSPEED, Start("deepspeed", 5, 8, 1, 4, "a", 29500)),
        # torchrun inside what Slurm and MPI started, one agent a node; alone in one task.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN, BY_TORCHRUN),
        (MPICH | {"PMI_SIZE": "2", "PMI_RANK": "1"} | TORCHRUN, BY_TORCHRUN),
        (SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "1", "GROUP_WORLD_SIZE": "1"}, BY_TORCHRUN),
        # Shells of an allocation, with torchrun inside and alone.
        (BATCH | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, BY_TORCHRUN),
        (INTERACTIVE | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, BY_TORCHRUN),
        (BATCH, Start()),
        (SALLOC, Start()),
        (INTERACTIVE, Start()),
        # srun's own variables, whatever else it sets.
        (SRUN, by_srun(2, 4, 2, 3)),
        (SRUN | {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}, by_srun(3, 4, 0, 1)),
        (PMI2, by_srun(2, 4, 2, 3)),
        (SRUN | {"PMIX_RANK": "2"}, by_srun(2, 4, 2, 3)),
        (SRUN | MASTER, by_srun(2, 4, 2, 3, "a", 29500)),
        (SRUN | {"SLURM_STEP_ID": "5", "SLURM_RESTART_COUNT": "1"}, by_srun(2, 4, 2, 3, port=SLURM_PORT + 5 + 1009)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"}, by_srun(2, 4, 2, 4, "127.0.0.1")),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"), by_srun(2, 4, 2, 3)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Start("Slurm (srun)")),
        # MPI knows where rank 0 is, unless it is told.
        (OPEN_MPI, Start("Open MPI", world_size=4, ask_mpi=True)),
        (OPEN_MPI | MASTER, Start("Open MPI", 3, 4, 1, 2, "a", 29500)),
        (MPICH, Start("MPICH", world_size=4, ask_mpi=True)),
        (MPICH | MASTER, Start("MPICH", 3, 4, 1, 2, "a", 29500)),
        (PROXY | MPICH, Start("MPICH", world_size=4, ask_mpi=True)),
        ({"PMIX_RANK": "1"} | MASTER, Start("PMIx", ask_mpi=True)),
        # Kubernetes: one process a pod.
        (POD | MASTER | {"RANK": "1", "WORLD_SIZE": "2"}, Start("Kubernetes", 1, 2, 0, 1, "a", 29500)),
        (POD | MASTER | {"WORLD_SIZE": "2"}, Start("Kubernetes", 1, 2, 0, 1, "a", 29500)),
        (POD | TORCHRUN, BY_TORCHRUN),
        ({"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "1"}, Start("Kubernetes")),
        # By hand, with a number on the host from whoever has one.
        (MASTER | {"RANK": "1", "WORLD_SIZE": "4"}, Start("variables RANK and WORLD_SIZE", 1, 4, 0, 1, "a", 29500)),
        (SRUN | MASTER | {"RANK": "2", "WORLD_SIZE": "4"}, Start("variables RANK and WORLD_SIZE", 2, 4, 2, 4, "a", 29500)),
    ],
)  # fmt: skip
def test_who_this_process_is(env: dict[str, str], start: Start) -> None:
    assert find_start(env) == start


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "1"}, ["RANK is set", "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"]),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["WORLD_SIZE is set", "RANK, MASTER_ADDR, MASTER_PORT is not"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK is set", "RANK, WORLD_SIZE"]),
        ({"RANK": "first", "WORLD_SIZE": "2"}, ["RANK is 'first'", "whole number"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["rank 2 of 2", "0 to 1"]),
        (without(SRUN, "SLURM_LOCALID"), ["SLURM_PROCID", "SLURM_LOCALID is not"]),
        (without(SRUN, "SLURM_JOB_ID"), ["SLURM_JOB_ID (or MASTER_PORT) is not"]),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"), ["SLURM_NODELIST (or MASTER_ADDR)"]),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ["SLURM_PROCID", "SLURM_NTASKS is not"]),
        (SRUN | {"SLURM_STEP_NODELIST": "node[03-x]"}, ["node[03-x]", "MASTER_ADDR"]),
        (POD, ["JOB_COMPLETION_INDEX is 1", "WORLD_SIZE", "every pod would train alone", "MASTER_ADDR"]),
        ({"JOB_COMPLETION_INDEX": "0"}, ["every pod would train alone"]),
        # Each of several processes was told that it is the whole job.
        (SRUN | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, ["Slurm (srun) started 4", "4 separate trainings", "--nnodes 4"]),
        (MPICH | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, ["MPICH started 4", "separate trainings"]),
        (SRUN | DEEPSPEED | {"CROSS_SIZE": "1"}, ["Slurm (srun) started 4", "deepspeed", "separate trainings"]),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, ["Open MPI started 4", "job of 1 rank"]),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ["Slurm (srun) started 4", "job of 1 rank"]),
    ],
)  # fmt: skip
def test_half_given_or_each_alone(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as caught:
        find_start(env)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("node03", ["node03"]),
        ("node[03-05,9]", ["node03", "node04", "node05", "node9"]),
        ("node[098-101]", ["node098", "node099", "node100", "node101"]),
        ("login,gpu[1-2]-ib,c7", ["login", "gpu1-ib", "gpu2-ib", "c7"]),
        # As `scontrol show hostnames` gives them.
        (
            "rack[1-2]n[08-10,15],login",
            [*(f"rack{rack}n{node}" for rack in (1, 2) for node in ("08", "09", "10", "15")), "login"],
        ),
        ("", []),
    ],
)
def test_host_lists(hosts: str, names: list[str]) -> None:
    assert list(spread(hosts)) == names


def test_launchers_that_mpi4py_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpi4py of another MPI than mpirun's: every process finds itself alone, and would train alone."""
    import sys
    import types

    from sparselora_dist.engines.ranks import discover_ranks

    lonely: Any = types.ModuleType("mpi4py")
    lonely.MPI = types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(rank=0, size=1), COMM_TYPE_SHARED=0)
    monkeypatch.setitem(sys.modules, "mpi4py", lonely)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"Open MPI's variables say 4 processes, but mpi4py knows 1: .*another MPI"):
        discover_ranks()
