"""Which launcher started this process, and what its variables say of the job: one answer for all of them.

The innermost launcher that numbers the ranks is asked: torchrun's, DeepSpeed's and plain variables (``RANK``), then MPI's,
then Slurm's (``srun`` without any of these), then an indexed Kubernetes job's. What is half given is refused with what is
missing, and so are several processes of an outer launcher that each were told to train alone.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Launcher -> its variables for rank, number of ranks, rank on this host, number of ranks on this host.
_MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "PMIx": ("PMIX_RANK", "", "", ""),
}  # fmt: skip
# Steps of Slurm that srun did not start: the batch script, the shell of salloc, what came by ssh. Their numbers are
# SLURM_BATCH_SCRIPT, SLURM_INTERACTIVE_STEP and SLURM_EXTERN_CONT of slurm.h.
_NOT_BY_SRUN = ("4294967291", "4294967290", "4294967292")
# Below the ports that Linux gives to outgoing connections (32768 and up).
_PORTS = range(15000, 30000)


class LaunchError(ValueError, RuntimeError):
    """The launcher's variables contradict each other, or say half of what is needed."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the launcher says of this process."""

    launcher: str = ""
    """Its name, for people; empty for a process alone."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1
    """``None``: not said."""
    master_addr: str | None = None
    master_port: int | None = None
    ask_mpi: bool = False
    """The numbers are MPI's, and it alone can tell where rank 0 is: mpi4py must be asked."""


def find_start(environment: Mapping[str, str]) -> Start:
    """Read the launcher's variables.

    Raises:
        LaunchError: a variable is missing or not a number, or several processes each believe to be alone.
    """
    env = {name: value for name, value in environment.items() if value}
    step = _srun_tasks(env)
    if "RANK" in env:
        start = _by_rank(env)
        _refuse_several_alone(env, start, step)
        return start
    if "WORLD_SIZE" in env and "JOB_COMPLETION_INDEX" not in env and _number(env, "WORLD_SIZE") > 1:
        raise LaunchError(_half("WORLD_SIZE", env, ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]))
    if mpi := _mpi(env, by_srun=step is not None):
        return _by_mpi(env, mpi)
    if step is not None:
        return _by_srun(env, step)
    if "JOB_COMPLETION_INDEX" in env:
        return _by_kubernetes(env)
    if _number(env, "LOCAL_RANK", 0) > 0:
        raise LaunchError(_half("LOCAL_RANK", env, ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]))
    return Start()


def boot_id() -> str:
    """This kernel's boot, which clones of a host do not share and its containers do; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def node_name() -> str:
    """What tells this host apart: its name, its kernel's boot (clones share a name), and torchrun's number of the node.

    ``SPARSELORA_NODE`` goes before all that, where several hosts look like one or one like several.
    """
    if told := os.environ.get("SPARSELORA_NODE"):
        return told
    return "/".join(filter(None, [socket.gethostname(), boot_id()[:8], os.environ.get("GROUP_RANK")]))


def spread(hosts: str) -> Iterator[str]:
    """The names in a Slurm host list: ``rack[1-2]n[08-10,15],login`` is ``rack1n08``, ``rack1n09``, ...

    Raises:
        LaunchError: it is not a host list.
    """
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hosts):
        parts = [
            list(_numbers(part[1:-1], hosts)) if part.startswith("[") else [part]
            for part in re.findall(r"\[[^\]]*\]|[^\[]+", item)
        ]
        yield from map("".join, itertools.product(*parts))


def _numbers(ranges: str, hosts: str) -> Iterator[str]:
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise LaunchError(f"Slurm's host list {hosts!r} cannot be read: set MASTER_ADDR to the first host's name")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


# --- launcher by launcher ---------------------------------------------------------------------------------------------


def _by_rank(env: Mapping[str, str]) -> Start:
    launcher = "variables RANK and WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif "CROSS_SIZE" in env:
        launcher = "deepspeed"
    elif "JOB_COMPLETION_INDEX" in env:
        launcher = "Kubernetes"
    if "WORLD_SIZE" not in env:
        raise LaunchError(_half("RANK", env, ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]))
    world = _number(env, "WORLD_SIZE")
    # One process a host where nothing else is said, as in a pod.
    local, local_size = 0, 1
    for rank_name, size_name in (
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        *((names[2], names[3]) for names in _MPI.values() if names[2]),
        ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ):
        if rank_name in env:
            local = _number(env, rank_name)
            local_size = _number(env, size_name, _number(env, "LOCAL_SIZE", world))
            break
    return _checked(Start(launcher, _number(env, "RANK"), world, local, local_size, *_master(env)))


def _mpi(env: Mapping[str, str], by_srun: bool) -> str | None:
    """The MPI launcher that gave this process its number; srun's own PMI says no more than Slurm's variables do."""
    for launcher, names in _MPI.items():
        found = [name for name in names if name in env]
        if not found:
            continue
        rank = env.get(names[0])
        told = env.get(names[1]) if names[1] else None
        if by_srun and rank == env.get("SLURM_PROCID") and told in (None, _tasks(env)):
            return None
        return launcher
    return None


def _by_mpi(env: Mapping[str, str], launcher: str) -> Start:
    names = _MPI[launcher]
    master = _master(env)
    if all(name in env for name in names) and None not in master:
        rank, world, local, here = (_number(env, name) for name in names)
        return _checked(Start(launcher, rank, world, local, here, *master))
    # What is known may be 1, that is too little: the one who asks compares.
    return Start(launcher, world_size=_number(env, names[1], 1) if names[1] else 1, ask_mpi=True)


def _srun_tasks(env: Mapping[str, str]) -> int | None:
    """Tasks of the step that srun started this process in; None in a batch script, a shell of salloc, or no job."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is None or step in _NOT_BY_SRUN or "SLURM_PROCID" not in env:
        return None
    if _tasks(env) is None:
        raise LaunchError(_half("SLURM_STEP_ID and SLURM_PROCID", env, ["SLURM_NTASKS"]))
    return _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")


def _tasks(env: Mapping[str, str]) -> str | None:
    return env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))


def _by_srun(env: Mapping[str, str], tasks: int) -> Start:
    launcher = "Slurm (srun)"
    if tasks == 1:
        return Start(launcher)
    nodes_name = next((n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if n in env), None)
    missing = [name for name in ("SLURM_LOCALID",) if name not in env]
    address, port = _master(env)
    if address is None and nodes_name is None:
        missing.append("SLURM_NODELIST (or MASTER_ADDR)")
    if port is None and "SLURM_JOB_ID" not in env:
        missing.append("SLURM_JOB_ID (or MASTER_PORT)")
    if missing:
        raise LaunchError(_half("SLURM_PROCID and SLURM_NTASKS", env, missing))
    here = _tasks_here(env, tasks)
    if address is None:
        hosts = list(spread(env[str(nodes_name)]))
        if not hosts:
            raise LaunchError(f"{nodes_name} is {env[str(nodes_name)]!r}, which names no host: set MASTER_ADDR")
        # A host that stands alone need not find its own name.
        address = "127.0.0.1" if here == tasks else hosts[0]
    if port is None:
        # The same for all tasks, another for another step, or the same job started again by Slurm.
        step = _number(env, "SLURM_STEP_ID", _number(env, "SLURM_STEPID", 0))
        again = _number(env, "SLURM_RESTART_COUNT", 0)
        port = _PORTS[(_number(env, "SLURM_JOB_ID") * 7 + step + again * 1009) % len(_PORTS)]
    return _checked(
        Start(launcher, _number(env, "SLURM_PROCID"), tasks, _number(env, "SLURM_LOCALID"), here, address, port)
    )


def _tasks_here(env: Mapping[str, str], tasks: int) -> int | None:
    """Tasks on this host, by ``2(x3),1``: the first three nodes have two each, the fourth one."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]  # fmt: skip
    node = _number(env, "SLURM_NODEID", 0)
    if sum(counts) == tasks and node < len(counts):
        return counts[node]
    return None


def _by_kubernetes(env: Mapping[str, str]) -> Start:
    """One process a pod; the pod's index is its rank."""
    if "WORLD_SIZE" not in env:
        raise LaunchError(
            f"JOB_COMPLETION_INDEX is {env['JOB_COMPLETION_INDEX']}: this is a pod of an indexed Kubernetes job, but "
            "WORLD_SIZE, the number of its pods, is not set, and every pod would train alone: set WORLD_SIZE (1 if it is "
            "the only pod), MASTER_ADDR (the first pod's name in the headless service) and MASTER_PORT, or start torchrun"
        )
    world = _number(env, "WORLD_SIZE")
    return _checked(Start("Kubernetes", _number(env, "JOB_COMPLETION_INDEX"), world, 0, 1, *_master(env)))


# --- what cannot be ---------------------------------------------------------------------------------------------------


def _refuse_several_alone(env: Mapping[str, str], start: Start, step: int | None) -> None:
    """Several tasks around what believes to be the whole job: ``srun -n 2 torchrun --standalone``."""
    around = {launcher: _number(env, names[1], 1) for launcher, names in _MPI.items() if names[1]}
    around["Slurm (srun)"] = step or 1
    groups = env.get("GROUP_WORLD_SIZE", env.get("CROSS_SIZE"))
    for launcher, count in around.items():
        alone = count > 1 and (groups == "1" if groups else start.world_size < count)
        if alone:
            raise LaunchError(
                f"{launcher} started {count} processes, but {start.launcher} in this one makes a job of "
                f"{start.world_size} rank(s) on one node: that is {count} separate trainings in one folder. Tell it of all "
                f"{count} (torchrun --nnodes {count} --rdzv-backend c10d --rdzv-endpoint HOST:PORT), start it once, or, "
                "where separate trainings are meant, take the outer launcher's variables away (env -u SLURM_STEP_ID ...)"
            )


def _checked(start: Start) -> Start:
    if not 0 <= start.rank < start.world_size:
        raise LaunchError(
            f"{start.launcher} says rank {start.rank} of {start.world_size}: ranks count from 0 to {start.world_size - 1}"
        )
    return start


def _master(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    return env.get("MASTER_ADDR"), _number(env, "MASTER_PORT") if "MASTER_PORT" in env else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise LaunchError(f"{name} is {value!r}: it must be a whole number") from None


def _half(given: str, env: Mapping[str, str], needed: list[str]) -> str:
    missing = [name for name in needed if name not in env]
    return (
        f"{given} is set, but {', '.join(missing)} is not: start with torchrun, deepspeed, mpirun or srun, or set what is "
        "missing"
    )
