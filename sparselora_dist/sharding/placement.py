"""Which part of every frozen tensor a rank keeps, so that it reads, encodes and holds nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

Share = Callable[[Tensor], Tensor]
"""From what the rows of this rank say, (n, k), to what all rows of the matrix say, (C, k). A collective."""


def alone(rows: Tensor) -> Tensor:
    """The :data:`Share` of a rank that has all rows."""
    return rows


class OtherRankError(ValueError):
    """Another rank could not go on; what it says is quoted."""


class Placement:
    """All of it: one process. The engines that shard have subclasses of their own.

    Args:
        device: where weights are encoded and computed with.
        rank, size: this rank's number among those that share one copy of the weights, and how many they are.
        group: their process group.
        home: where the parameters live, if not on ``device``: the host, when the engine offloads them.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        home: torch.device | None = None,
    ) -> None:
        self.device, self.rank, self.size, self.group = device, rank, size, group
        self.home = home or device

    def rows(self, total: int, widths: Sequence[int], rank: int | None = None) -> tuple[int, int]:
        """The rows ``[start, stop)`` out of ``total`` that a rank needs to make its shards of tensors of these widths."""
        return 0, total

    def parameter(self, rows: Tensor, start: int, shape: torch.Size) -> nn.Parameter:
        """A frozen parameter of ``shape``, from this rank's ``rows`` beginning at ``start``; a collective under none."""
        return nn.Parameter(rows, requires_grad=False)

    def share(self, total: int, widths: Sequence[int]) -> Share:
        """Exchanges what ranks know of their rows; see :data:`Share`."""
        if self.size == 1:
            return alone
        spans = [self.rows(total, widths, rank) for rank in range(self.size)]
        most = max(stop - start for start, stop in spans)

        def gather(mine: Tensor) -> Tensor:
            self._agree(None)
            padded = torch.nn.functional.pad(mine, (0, 0, 0, most - mine.shape[0]))
            everyone = padded.new_empty(self.size * most, mine.shape[1])
            dist.all_gather_into_tensor(everyone, padded, group=self.group)
            whole = mine.new_empty(total, mine.shape[1])
            for (start, stop), rows in zip(spans, everyone.split(most)):
                whole[start:stop] = rows[: stop - start]
            return whole

        return gather

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which nothing but :meth:`share` is collective: if it fails on one rank, it fails on all.

        Raises:
            OtherRankError: on the ranks that have no error of their own.
        """
        try:
            yield
        except OtherRankError:
            raise
        except Exception as error:
            self._agree(error)
            raise
        self._agree(None)

    def _agree(self, error: Exception | None) -> None:
        """Every exchange begins with this one, so that a rank that fails meets the others wherever they are."""
        if self.group is None or dist.get_world_size() == 1:
            return
        # All ranks, not the group: the replicas of a shard end together too.
        failed = torch.tensor(int(error is not None), device=self.device)
        dist.all_reduce(failed)
        if not failed:
            return
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if error is None else str(error) or type(error).__name__)
        if error is None:
            rank, message = next((rank, message) for rank, message in enumerate(told) if message is not None)
            raise OtherRankError(f"rank {rank} could not go on: {message}")


class RowShards(Placement):
    """FSDP2: dim 0 in equal chunks, the last ones shorter or empty.

    The parameter is made on the meta device, with this rank's rows beside it: ``fully_shard`` makes the shards, and
    :func:`waiting_rows` gives what to fill them with.
    """

    def rows(self, total: int, widths: Sequence[int], rank: int | None = None) -> tuple[int, int]:
        chunk = -(-total // self.size)
        rank = self.rank if rank is None else rank
        return min(rank * chunk, total), min((rank + 1) * chunk, total)

    def parameter(self, rows: Tensor, start: int, shape: torch.Size) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, dtype=rows.dtype, device="meta"), requires_grad=False)
        parameter.shard_rows = rows.to(self.home)
        return parameter


def waiting_rows(parameter: Tensor) -> Tensor | None:
    """The rows that :class:`RowShards` laid beside a parameter."""
    return getattr(parameter, "shard_rows", None)


def take_rows(parameter: Tensor) -> Tensor:
    """The same, once: what still refers to the parameter does not keep them alive."""
    rows: Tensor = parameter.__dict__.pop("shard_rows")
    return rows
