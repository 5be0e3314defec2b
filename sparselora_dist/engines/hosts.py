"""Which ranks are on which host: ranks numbered host by host, and groups of them that respect the hosts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Place:
    """A rank, as its launcher numbers it, and the name of its host."""

    rank: int
    host: str


def exchange(store: dist.Store, mine: Place, world_size: int) -> list[Place]:
    """Every rank's place, by the launcher's rank, through the store: before there is a process group."""
    store.set(f"host/{mine.rank}", mine.host)
    keys = [f"host/{rank}" for rank in range(world_size)]
    store.wait(keys)
    return [Place(rank, store.get(key).decode()) for rank, key in enumerate(keys)]


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
