"""A sparse model under ``torch.compile``: the graph goes through every layer, and one operation in it is not looked into.

That operation gives the kept channels, or the rows that they own. It runs the eager code, with the collectives, the masks
of other forwards and all that is Python's; the graph sees a tensor whose length is known beforehand. A forward is known in
the graph by its ticket, a tensor: with activation checkpointing the operation runs again in backward and finds the masks
there. What differs from batch to batch is the length of the token lists; they are marked so, and nothing is compiled again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .context import SparseContext
from .micro_batch import MicroBatch


class Chooser(Protocol):
    """Who chooses the channels of a site, and remembers them in the micro-batch."""

    context: SparseContext

    def kept(self, role: str, x: Any, batch: MicroBatch) -> Tensor:
        """What context tokens take of ``role``, (k,) int64; ``x`` (T, in), or all that was given to :func:`kept`, is
        read where the mask is new."""
        ...


_choosers: WeakValueDictionary[int, Chooser] = WeakValueDictionary()
_numbers = count()


class Handle:
    """The number by which a graph knows a chooser; a copy of the chooser has a number of its own."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.number = next(_numbers)
        _choosers[self.number] = chooser

    def __reduce__(self) -> tuple:
        return Handle, (self.chooser,)


def _kept(x: list[Tensor], ticket: Tensor, handle: int, role: str, length: int) -> Tensor:
    chooser = _choosers[handle]
    # The result of an operation must not be what somebody else holds.
    return chooser.kept(role, x[0] if len(x) == 1 else x, chooser.context.pending(int(ticket))).clone()


_run = torch.library.custom_op("sparselora::kept", _kept, mutates_args=())
_run.register_fake(lambda x, ticket, handle, role, length: x[0].new_empty(length, dtype=torch.int64))


def kept(handle: Handle, role: str, x: Tensor | list[Tensor], batch: MicroBatch, length: int) -> Tensor:
    """:meth:`Chooser.kept` as one node of a graph; its ``length`` must be known."""
    return _run(x if isinstance(x, list) else [x], batch.ticket, handle.number, role, length)


def lengths_vary(tensors: Iterable[Tensor]) -> None:
    """Say that these have another length in every batch. Costs nothing where nobody compiles."""
    if "torch._dynamo" in sys.modules:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
