"""Mask synchronisation: the score sums of all ranks are added before the channels are chosen.

A rank that skips one all-reduce is the worst fault there is: the backend silently pairs its next one, of another layer
or another purpose. So the mask collectives

- have a process group of their own, and never pair with (or queue behind) a gather of weights or gradients;
- all have the same size, so that a mismatch can neither abort the backend nor corrupt memory;
- carry one slot per rank with its site, call number and a non-finite flag. The sum over ranks therefore shows every
  rank where every other rank is, and an error names both.

They are started, and waited for when the sums are needed, so that products may run meanwhile. One rank alone starts
nothing; that its scores are finite is seen by the selection itself, which hands over a flag.

On CPU the slots are compared at once. On a GPU that would wait for the device in every layer, so they are kept and
compared by :meth:`MaskSync.check`: once per optimizer step where the training loop calls it before the step, else once
per forward by the model.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from ..launchers import node_name

SyncMode = Literal["global", "node", "local"]

# Slot of a rank in the payload: site + 1 (0 means that the rank took no part), call number, non-finite flag.
_SLOT = 3
_KINDS = ("attention", "ffn", "experts")
# Integers up to here are exact in fp32.
_CALL_MODULUS = 1 << 20
# In the place of the call number: not a reduction's slots, but a selection's flag.
_FLAG = -1
# Reductions that may wait to be compared: more than the micro-batches of any step, should nobody call check.
_MOST_PENDING = 1 << 14
# How long a failing rank waits for the others to say where they are.
_POST_MORTEM_SECONDS = 3.0


class MaskSyncError(RuntimeError):
    """The ranks disagree about which mask they are choosing, a rank is missing, or its scores are not finite."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a mask is chosen."""

    layer: int
    kind: Literal["attention", "ffn", "experts"]

    @property
    def number(self) -> int:
        return len(_KINDS) * self.layer + _KINDS.index(self.kind)

    @staticmethod
    def name_of(number: int) -> str:
        layer, kind = divmod(number, len(_KINDS))
        return f"layer {layer} {_KINDS[kind]}"

    def __str__(self) -> str:
        return Site.name_of(self.number)


@dataclass(slots=True)
class Reduction:
    """Sums on their way to the other ranks and back."""

    sync: MaskSync
    site: Site
    call: int
    sums: tuple[Tensor, ...]
    payload: Tensor | None = None
    """``None`` where there is one rank."""
    work: dist.Work | None = None

    def wait(self) -> tuple[Tensor, ...]:
        """Σ over the ranks, as they were given, fp32; on a GPU the stream waits and not the host. Once.

        Raises:
            MaskSyncError: a rank did not arrive in time.
        """
        if self.payload is None:
            return self.sums
        self.sync.arrived(self)
        sizes = [sums.numel() for sums in self.sums]
        return self.payload[: sum(sizes)].split(sizes)


class MaskSync:
    """Adds score sums over the ranks whose tokens choose the channels together.

    Args:
        mode: ``global`` (the data-parallel group), ``node`` (its ranks on this node) or ``local`` (this rank alone).
        capacity: the largest number of sums that a site reduces; every collective has this size plus the slots.
        process_group: the data-parallel group; ``None`` is the default group, if there is one.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(
        self,
        mode: SyncMode,
        capacity: int,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 1800.0,
    ) -> None:
        self.mode = mode
        self.capacity = capacity
        self.timeout = timeout
        self.collectives = 0
        """All-reduces issued so far."""
        self._data_parallel = process_group
        self._group: dist.ProcessGroup | None = None
        self._ranks: list[int] | None = None
        self._calls = 0
        # Slots of a reduction with its call, and flags of selections.
        self._pending: list[tuple[Tensor, Site, int]] = []

    def __deepcopy__(self, memo: dict) -> MaskSync:
        # Process groups cannot be copied; a copied model makes its own on first use.
        return MaskSync(self.mode, self.capacity, self._data_parallel, self.timeout)

    @property
    def ranks(self) -> list[int]:
        """Global ranks that choose together; made on first use, which must be on all ranks at the same point."""
        if self._ranks is None:
            self._connect()
        assert self._ranks is not None
        return self._ranks

    def _connect(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            self._ranks = [0]
            return
        me = dist.get_rank()
        everyone = dist.get_process_group_ranks(self._data_parallel or dist.group.WORLD)
        if self.mode == "local" or len(everyone) == 1:
            self._ranks = [me]
            return
        self._ranks = everyone if self.mode == "global" else self._node_ranks(everyone)
        self._group = dist.new_group(
            self._ranks, timeout=datetime.timedelta(seconds=self.timeout), use_local_synchronization=True
        )

    def _node_ranks(self, everyone: list[int]) -> list[int]:
        mine = node_name()
        names: list[str] = [""] * len(everyone)
        dist.all_gather_object(names, mine, group=self._data_parallel)
        return [rank for rank, name in zip(everyone, names) if name == mine]

    def start(self, site: Site, *parts: Tensor) -> Reduction:
        """Begin to add ``parts`` (n_i,) fp32, at most ``capacity`` in all, over the ranks. All ranks take part, in order.

        With one rank there is nothing to do. Whoever selects by the result gives the flag of the selection to
        :meth:`watch`.

        Raises:
            MaskSyncError: the group cannot be made because a rank stays away, or the backend refuses.
        """
        self._calls += 1
        call = self._calls % _CALL_MODULUS
        try:
            ranks = self.ranks
        except RuntimeError as error:  # A rank that stays away from the first mask is missed when the group is made.
            raise MaskSyncError(self._post_mortem(site)) from error
        if self._group is None:
            return Reduction(self, site, call, parts)
        sums = parts[0] if len(parts) == 1 else torch.cat(parts)
        slot = ranks.index(dist.get_rank())
        payload = sums.new_zeros(self.capacity + _SLOT * len(ranks))
        own, header = payload[: sums.numel()], payload[self.capacity :]
        # Filled on the device: no copy from the host, no wait. Zero times what is not finite is NaN.
        header[_SLOT * slot].fill_(site.number + 1)
        header[_SLOT * slot + 1].fill_(call)
        torch.dot(sums, own, out=header[_SLOT * slot + 2])
        own.copy_(sums)
        try:
            work = dist.all_reduce(payload, group=self._group, async_op=True)
        except RuntimeError as error:
            raise MaskSyncError(self._post_mortem(site)) from error
        self.collectives += 1
        return Reduction(self, site, call, parts, payload, work)

    def arrived(self, reduction: Reduction) -> None:
        """Wait for the collective of ``reduction``, and remember its slots."""
        assert reduction.payload is not None and reduction.work is not None
        try:
            reduction.work.wait()
        except RuntimeError as error:
            raise MaskSyncError(self._post_mortem(reduction.site)) from error
        # A copy: a view would keep every payload of an optimizer step alive.
        self._pending.append((reduction.payload[self.capacity :].clone(), reduction.site, reduction.call))

    @property
    def alone(self) -> bool:
        """Whether no other rank is asked. Known once the first mask was chosen."""
        return self._group is None

    def reduce(self, site: Site, sums: Tensor) -> Tensor:
        """Σ over the ranks of ``sums`` (n,) fp32, waited for and watched.

        Raises:
            MaskSyncError: another rank is at another site, did not arrive in time, or has non-finite sums (on a GPU
                the first and the last are raised by :meth:`check`, and under NCCL it is the backend's own watchdog that
                ends a rank which waits in vain).
        """
        (total,) = self.start(site, sums).wait()
        self.watch(site, total.mul(0.0).sum(0, keepdim=True))
        return total

    def watch(self, site: Site, flag: Tensor) -> None:
        """Remember ``flag`` (1,), which is zero if the scores that were selected by at ``site`` are finite.

        Raises:
            MaskSyncError: see :meth:`reduce`; on a CPU all of it is compared here.
        """
        self._pending.append((flag, site, _FLAG))
        if flag.device.type == "cpu" or len(self._pending) >= _MOST_PENDING:
            self.check()

    def check(self) -> None:
        """Compare the slots of all reductions, and look at all flags, since the last check. Waits for the device.

        Raises:
            MaskSyncError: see :meth:`reduce`.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        # One copy from the device for all of them.
        values = iter(torch.cat([header for header, _, _ in pending]).tolist())
        for header, site, call in pending:
            found = list(islice(values, header.numel()))
            if call != _FLAG:
                self._compare(found, site, call)
            elif found[0] != 0.0:
                self._refuse(site, self.ranks)

    def _compare(self, header: list[float], site: Site, call: int) -> None:
        slots = [header[start : start + _SLOT] for start in range(0, len(header), _SLOT)]
        for rank, (number, its_call, _) in zip(self.ranks, slots):
            if (number, its_call) != (site.number + 1, call):
                me = dist.get_rank()
                theirs = Site.name_of(int(number) - 1) if number else "no site"
                raise MaskSyncError(
                    f"mask synchronisation mismatch: rank {me} is at {site} (call {call}), rank {rank} is at "
                    f"{theirs} (call {int(its_call)}). A rank skipped or repeated a forward of that layer: every "
                    "rank must run the same layers in the same order, also with an empty micro-batch"
                )
        if bad := [rank for rank, (_, _, flag) in zip(self.ranks, slots) if flag]:
            self._refuse(site, bad)

    def _refuse(self, site: Site, ranks: list[int]) -> None:
        raise MaskSyncError(
            f"non-finite channel scores at {site} on rank {', '.join(map(str, ranks))}: the hidden states "
            "overflowed or are NaN. No step was taken; lower the learning rate or use bfloat16"
        )

    def _post_mortem(self, site: Site) -> str:
        """Say where this rank is, and ask the others, through the store of the default group."""
        store, me = _get_default_store(), dist.get_rank()
        prefix = "sparselora/mask"
        store.set(f"{prefix}/{me}", str(site))
        words, deadline = [], time.monotonic() + _POST_MORTEM_SECONDS
        for rank in self._ranks or dist.get_process_group_ranks(self._data_parallel or dist.group.WORLD):
            if rank == me:
                continue
            try:
                left = max(deadline - time.monotonic(), 0.05)
                store.wait([f"{prefix}/{rank}"], datetime.timedelta(seconds=left))
                words.append(f"rank {rank} is at {store.get(f'{prefix}/{rank}').decode()}")
            except RuntimeError:
                words.append(f"rank {rank} did not arrive")
        return f"mask synchronisation failed: rank {me} is at {site}; {'; '.join(words)}"
