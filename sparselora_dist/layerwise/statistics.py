"""What is known of a matrix's inputs, the same to the bit however many ranks look at them.

Sequences are dealt in parts: a part is summed from zero in the order of its sequences, on one rank, and the parts are added
in their order. A sequence runs alone, so that nothing depends on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Statistic = Literal["", "squares", "products"]
"""What is summed over the calibration tokens ``X`` (T, in) of a matrix: nothing, ``Σ X²`` (in,), or ``XᵀX`` (in, in)."""
PARTS = 8
"""Into how many parts the sequences are dealt: the most ranks that can share them."""


def sharers(sequences: int, ranks: int) -> int:
    """How many ranks have sequences, the first ones; the others wait for them."""
    return min(PARTS, sequences, ranks)


def parts_of(sequences: int, rank: int, ranks: int) -> list[range]:
    """The parts of a rank, each the numbers of its sequences."""
    count, ranks = min(PARTS, sequences), sharers(sequences, ranks)
    bounds = [sequences * part // count for part in range(count + 1)]
    mine = range(count * rank // ranks, count * (rank + 1) // ranks) if rank < ranks else ()
    return [range(bounds[part], bounds[part + 1]) for part in mine]


def deal(shapes: dict[str, torch.Size], ranks: int) -> dict[str, int]:
    """Which rank works on which matrix: the costliest first, each to who has least."""
    load = [0] * ranks
    owners = {}
    for name in sorted(shapes, key=lambda name: -shapes[name][0] * shapes[name][1] ** 2):
        owners[name] = load.index(min(load))
        load[owners[name]] += shapes[name][0] * shapes[name][1] ** 2
    return owners


class Inputs:
    """Sums over what goes into some linears of a layer.

    Args:
        linears: by name; those that are given the same tensor share a sum.
        statistic: which.
    """

    def __init__(self, linears: dict[str, nn.Module], statistic: Statistic) -> None:
        self.statistic = statistic
        self.sums: list[dict[str, Tensor]] = []
        """Of each part so far, by the first name that has it."""
        self.first: dict[str, str] = {}
        """A linear's name -> the name under which its inputs are summed."""
        self._last: tuple[str, Tensor] | None = None
        self._hooks = [
            linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears.items() if statistic
        ]

    def begin_part(self) -> None:
        self.sums.append({})

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self._last is not None and self._last[1] is x:
                self.first[name] = self._last[0]
                return
            self._last = name, x
            self.first[name] = name
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            more = rows.square().sum(0) if self.statistic == "squares" else rows.t() @ rows
            sums = self.sums[-1]
            sums[name] = more if name not in sums else sums[name].add_(more)

        return before


def gather(inputs: Inputs, name: str, owner: int) -> Tensor | None:
    """The sum of a linear's inputs over all parts, on the rank that works on it; ``None`` on the others. A collective."""
    key = inputs.first.get(name, "")  # No name on a rank without sequences.
    return add_parts([sums[key] for sums in inputs.sums], owner)


def add_parts(mine: list[Tensor], owner: int) -> Tensor | None:
    """The sum of all parts in their order, on rank ``owner``, which must have one; ``None`` on the others. A collective.

    Args:
        mine: this rank's parts, of one shape and dtype on all ranks.
        owner: who adds.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total: Tensor | None = None
    for part, source in _in_order(len(mine), ranks):
        if rank == owner:
            value = mine[part] if source == rank else torch.empty_like(mine[0])
            if source != rank:
                dist.recv(value, source)
            total = value.clone() if total is None else total.add_(value)
        elif source == rank:
            dist.send(mine[part], owner)
    return total


def _in_order(mine: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Every part as (its number on its rank, its rank)."""
    counts = [mine]
    if ranks > 1:
        counts = [0] * ranks
        dist.all_gather_object(counts, mine)
    yield from ((part, rank) for rank, count in enumerate(counts) for part in range(count))
