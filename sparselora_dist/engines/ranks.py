"""Where this process stands in the job, by what its launcher says, and the process group of all of them."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ..sync.heartbeat import Heartbeat

_LAUNCHED = ("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands in the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def discover_ranks() -> Ranks:
    """Ranks from the launcher: torchrun's and DeepSpeed's variables, or MPI (mpirun, through mpi4py).

    Under MPI the variables that PyTorch reads are set from the communicator.
    """
    env = os.environ
    if "RANK" not in env and any(name in env for name in _LAUNCHED):
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise RuntimeError("started by mpirun, but mpi4py is not installed: pip install mpi4py") from error
        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        address = (socket.gethostname(), free_port()) if world.rank == 0 else None
        host, port = world.bcast(address)
        env.update(
            RANK=str(world.rank),
            WORLD_SIZE=str(world.size),
            LOCAL_RANK=str(local.rank),
            LOCAL_WORLD_SIZE=str(local.size),
        )
        env.setdefault("MASTER_ADDR", "127.0.0.1" if local.size == world.size else host)
        env.setdefault("MASTER_PORT", str(port))
    size = int(env.get("WORLD_SIZE", 1))
    return Ranks(
        rank=int(env.get("RANK", 0)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        world_size=size,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size))),
    )


def local_device(ranks: Ranks) -> torch.device:
    """This process's GPU, made the current one; the CPU where no GPU is visible.

    With several visible GPUs each local rank takes its own. With exactly one it takes that, since Slurm and MPI can show
    each process a GPU of its own: whether two ranks got the same is seen in :func:`start_distributed`.

    Raises:
        ValueError: more ranks on this host than visible GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    started = max(ranks.local_world_size, ranks.local_rank + 1)
    if started > visible > 1:
        raise ValueError(
            _too_many(f"{started} ranks were started on this host, which has {visible} visible GPUs", visible)
        )
    index = ranks.local_rank % visible
    torch.cuda.set_device(index)
    # DeepSpeed takes its device from this. Open MPI's variable, where it is set, must say the same.
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(index)
    return torch.device("cuda", index)


def _too_many(what: str, most: int) -> str:
    return (
        f"{what}: start at most {most} a host (torchrun --nproc-per-node {most}, deepspeed --num_gpus {most}), let each "
        "rank see a GPU of its own (CUDA_VISIBLE_DEVICES), or set DS_ACCELERATOR=cpu to run on the CPU"
    )


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start_distributed(ranks: Ranks, timeout: float, heartbeat_timeout: float = 0.0) -> Heartbeat:
    """Start the default process group from the launcher's variables, and this rank's heartbeat; alone, a group of one.

    Raises:
        ValueError: two ranks have the same GPU.
    """
    if dist.is_initialized():
        return Heartbeat()
    env = os.environ
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        if ranks.world_size > 1:
            raise RuntimeError("MASTER_PORT is not set: start with torchrun, deepspeed or mpirun")
        env["MASTER_PORT"] = str(free_port())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=_open_store(ranks, timeout, "group"),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    if torch.cuda.is_available():
        refuse_shared_gpus()
    connect = partial(_open_store, ranks, max(heartbeat_timeout, 1.0), "heartbeat", client=True)
    address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    return Heartbeat(ranks.rank, ranks.world_size, heartbeat_timeout, connect, address).start()


def _open_store(ranks: Ranks, timeout: float, purpose: str, client: bool = False) -> dist.Store:
    """The job's store: torchrun's agent keeps it, else rank 0. A ``client`` connects to one that is there.

    torchrun keeps one store over its restarts, in which PyTorch's own start finds the addresses of the ranks that died. So
    every start has names of its own in it.
    """
    env = os.environ
    kept_by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        None if client else ranks.world_size,
        ranks.rank == 0 and not kept_by_agent and not client,
        datetime.timedelta(seconds=timeout),
        wait_for_workers=not client and not kept_by_agent,
        multi_tenant=True,
    )
    start = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sparselora/{start}/{ranks.world_size}/{purpose}", store)


def refuse_shared_gpus() -> None:
    """A collective, before NCCL has any: it would fail with a message that names no rank, or wait.

    Raises:
        ValueError: two ranks have the same GPU; all ranks raise it.
    """
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    places: list[tuple[str, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(places, mine)
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        holders.setdefault(place, []).append(rank)
    for (host, _), ranks in holders.items():
        if len(ranks) > 1:
            there = [place for place in places if place[0] == host]
            raise ValueError(
                _too_many(
                    f"{len(there)} ranks were started on {host} for {len(set(there))} GPU(s), and ranks "
                    f"{', '.join(map(str, ranks))} have the same one",
                    len(set(there)),
                )
            )
