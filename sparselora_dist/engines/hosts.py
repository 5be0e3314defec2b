"""Which ranks are on which host: ranks numbered host by host, and groups of them that respect the hosts."""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds until it is said which ranks have not begun; then twice as many."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank, as its launcher numbers it, and the name of its host."""

    rank: int
    host: str


def exchange(store: dist.Store, mine: Place, world_size: int, timeout: float) -> list[Place]:
    """Every rank's place, by the launcher's rank, through the store: before there is a process group.

    Args:
        timeout: seconds that the ranks are waited for. Who has not begun is said long before.

    Raises:
        TimeoutError: not all have begun; they are named, and the hosts of those that have.
    """
    store.set(f"host/{mine.rank}", mine.host)
    keys = [f"host/{rank}" for rank in range(world_size)]
    began, waits = time.monotonic(), _PATIENCE
    while True:
        left = timeout - (time.monotonic() - began)
        try:
            store.wait(keys, datetime.timedelta(seconds=max(min(waits, left), 0.1)))
            return [Place(rank, store.get(key).decode()) for rank, key in enumerate(keys)]
        except dist.DistStoreError:
            there = [rank for rank, key in enumerate(keys) if store.check([key])]
        waited = time.monotonic() - began
        away = ", ".join(str(rank) for rank in range(world_size) if rank not in there)
        counts = Counter(store.get(keys[rank]).decode().split("/")[0] for rank in there)
        hosts = ", ".join(f"{count} on {host}" for host, count in counts.items())
        said = f"{len(there)} of {world_size} ranks have begun ({hosts}); for {waited:.0f} s not rank {away}"
        if waited >= timeout:
            raise TimeoutError(f"{said}: see what its launcher says, or whether that host reaches this one")
        waits *= 2
        if mine.rank == there[0]:
            log.warning("%s (waiting for %.0f s, train.ddp_timeout)", said, timeout)


def by_host(places: Sequence[Place]) -> list[int]:
    """The launcher's ranks in the order in which they are numbered anew: a host's ranks stand together, in their order.

    Hosts come in the order of their first ranks, so rank 0 stays, and so do all where the launcher goes host by host.
    """
    first: dict[str, int] = {}
    for place in places:
        first.setdefault(place.host, place.rank)
    return [place.rank for place in sorted(places, key=lambda place: (first[place.host], place.rank))]


def check_groups(hosts: Sequence[str], size: int, key: str) -> None:
    """Groups of ``size`` consecutive ranks lie inside a host, or are made of whole hosts.

    Args:
        hosts: every rank's host.
        size: ranks of a group; divides their number.
        key: the setting that asks for it.

    Raises:
        ValueError: a group would lie across hosts; who has how many ranks, and what would fit.
    """
    counts = Counter(hosts)
    if size in (1, len(hosts)):
        return
    for start in range(0, len(hosts), size):
        group = Counter(hosts[start : start + size])
        if len(group) > 1 and any(counts[host] != there for host, there in group.items()):
            ranks = ", ".join(f"{host.split('/')[0]} has {count}" for host, count in counts.items())
            raise ValueError(
                f"'{key}' is {size}, but groups of {size} ranks would lie across hosts ({ranks}), and every gather of "
                "weights would go over the network: start the same number of ranks on every host, a multiple of the group's "
                "size (or hosts that make up a group together), or shard over all ranks"
            )
