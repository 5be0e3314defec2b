"""Where this process stands in the job, by what its launcher says, and the process group of all of them."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist

from ..launchers import LaunchError, Start, find_start, node_name
from ..process import SaidElsewhere
from ..sync.everyone import everyone
from ..sync.heartbeat import Heartbeat
from ..sync.processes import first_of_host
from .hosts import Place, by_host, exchange

log = logging.getLogger(__name__)

_heartbeat = Heartbeat()
"""Of the group that :func:`start_distributed` has started last."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands in the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = field(default="", compare=False)
    """Its name, for people; empty for a process alone."""
    hosts: tuple[str, ...] = field(default=(), compare=False)
    """Every rank's host, once they met."""


def discover_ranks() -> Ranks:
    """Ranks from the launcher, whichever it is; the variables that PyTorch and DeepSpeed read are set from them.

    Raises:
        LaunchError: the launcher's variables are half given, or contradict each other; mpi4py is needed and missing.
    """
    env = os.environ
    start = find_start(env)
    if start.ask_mpi:
        start = _ask_mpi(start)
    local_size = start.local_world_size or start.world_size
    if start.launcher:
        env.update(RANK=str(start.rank), WORLD_SIZE=str(start.world_size), LOCAL_RANK=str(start.local_rank))
        if "LOCAL_SIZE" not in env and start.local_world_size:
            env.setdefault("LOCAL_WORLD_SIZE", str(local_size))
        if start.master_addr and "MASTER_ADDR" not in env:
            _check_name(start.master_addr)
            env["MASTER_ADDR"] = start.master_addr
        if start.master_port:
            env.setdefault("MASTER_PORT", str(start.master_port))
    return Ranks(start.rank, start.local_rank, start.world_size, local_size, start.launcher)


def _check_name(host: str) -> None:
    """A name that nobody gave for this use: PyTorch would wait for it until its timeout."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise LaunchError(
            f"the ranks would meet on {host}, rank 0's host by its launcher, but {socket.gethostname()} does not know that "
            f"name ({error}): set MASTER_ADDR to an address of that host"
        ) from error


def _ask_mpi(start: Start) -> Start:
    """The same, by the communicator: MPI's ranks, and rank 0's host with a free port of its."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # The latter where it finds no MPI library.
        why = "is not installed" if isinstance(error, ImportError) else f"cannot be used ({error})"
        raise LaunchError(
            f"started by mpirun, but mpi4py {why}: pip install mpi4py, or give all processes MASTER_ADDR "
            "(the first host) and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if world.size < start.world_size:
        raise LaunchError(
            f"{start.launcher}'s variables say {start.world_size} processes, but mpi4py knows {world.size}: it was built "
            "with another MPI than the mpirun that started this. Start with the mpirun of that MPI, or give all "
            "processes MASTER_ADDR (the first host) and MASTER_PORT"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = world.bcast((socket.gethostname(), free_port()) if world.rank == 0 else None)
    return replace(
        start,
        rank=world.rank,
        world_size=world.size,
        local_rank=local.rank,
        local_world_size=local.size,
        master_addr="127.0.0.1" if local.size == world.size else host,
        master_port=port,
    )


@contextmanager
def met(timeout: float = 1800.0) -> Iterator[tuple[torch.device, bool]]:
    """The ranks of a command that is no run, together until it is done: this one's device, and whether it speaks.

    Raises:
        LaunchError, TimeoutError, ValueError: see the functions below.
    """
    ranks = discover_ranks()
    device = local_device(ranks)
    if ranks.world_size > 1:
        ranks, _ = start_distributed(ranks, timeout)
    yield device, ranks.rank == 0
    if dist.is_initialized():
        dist.destroy_process_group()


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


def start_distributed(ranks: Ranks, timeout: float, heartbeat_timeout: float = 0.0) -> tuple[Ranks, Heartbeat]:
    """Start the default process group from the launcher's variables, and this rank's heartbeat; alone, a group of one.

    Ranks are numbered host by host, whatever the launcher's mapping: neighbours in number are neighbours in place, so
    that groups of consecutive ranks (HSDP, hpZ) stay inside a host. Rank 0 stays what it is. Ranks that are together
    already stay as they are.

    Returns:
        Where this process stands now, with every rank's host; and what beats for it.

    Raises:
        LaunchError: nobody says where the ranks meet.
        TimeoutError: some ranks have not begun; they are named. Said once a host.
        ValueError: two ranks have the same GPU.
    """
    global _heartbeat
    if dist.is_initialized():
        return replace(ranks, rank=dist.get_rank(), hosts=tuple(everyone(node_name()))), _heartbeat
    env = os.environ
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if ranks.world_size > 1:
        needed = ("MASTER_ADDR", "MASTER_PORT") if ranks.local_world_size < ranks.world_size else ("MASTER_PORT",)
        if missing := [f"{name} is not set" for name in needed if name not in env]:
            raise LaunchError(
                f"{', '.join(missing)}: start with torchrun, deepspeed or mpirun, or set the name of rank 0's host "
                "(MASTER_ADDR) and a port that is free there (MASTER_PORT)"
            )
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(free_port())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = _open_store(ranks, timeout, "group")
    address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    try:
        places = exchange(store, Place(ranks.rank, node_name()), ranks.world_size, timeout)
    except TimeoutError as error:
        if not first_of_host(address):
            raise SaidElsewhere(1) from error
        raise
    order = by_host(places)
    rank = order.index(ranks.rank)
    hosts = tuple(places[old].host for old in order)
    connect = partial(_open_store, ranks, max(heartbeat_timeout, 1.0), "heartbeat", client=True)
    env["RANK"] = str(rank)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=ranks.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    if torch.cuda.is_available():
        refuse_shared_gpus()
    if rank == 0 and ranks.world_size > 1:
        count = len(set(hosts))
        moved = "" if order == list(range(len(order))) else ", numbered anew host by host"
        log.info("%d ranks on %d host(s) by %s, meeting at %s%s", len(order), count, ranks.launcher, address, moved)
    _heartbeat = Heartbeat(rank, ranks.world_size, heartbeat_timeout, connect, address).start()
    return replace(ranks, rank=rank, hosts=hosts), _heartbeat


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
        wait_for_workers=False,
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
    holders: dict[tuple[str, str], list[int]] = {}
    places: list[tuple[str, str]] = everyone(mine)
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
