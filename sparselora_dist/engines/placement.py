"""Which part of every frozen tensor a rank keeps, so that it reads, encodes and holds nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..codecs import Share, alone


class Placement:
    """All of it: one process. The engines that shard have subclasses of their own.

    Args:
        device: where the parameters live.
        rank, size: this rank's number among those that share one copy of the weights, and how many they are.
        group: their process group.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.device, self.rank, self.size, self.group = device, rank, size, group

    def rows(self, total: int, widths: Sequence[int], rank: int | None = None) -> tuple[int, int]:
        """The rows ``[start, stop)`` out of ``total`` that a rank needs to make its shards of tensors of these widths."""
        return 0, total

    def parameter(self, rows: Tensor, start: int, shape: torch.Size) -> nn.Parameter:
        """A frozen parameter of ``shape``, from this rank's ``rows`` beginning at ``start``; a collective under none."""
        return nn.Parameter(rows, requires_grad=False)

    def share(self, total: int, widths: Sequence[int]) -> Share:
        """Exchanges what ranks know of their rows; see :data:`sparselora_dist.codecs.Share`."""
        if self.size == 1:
            return alone
        spans = [self.rows(total, widths, rank) for rank in range(self.size)]
        most = max(stop - start for start, stop in spans)

        def gather(mine: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(mine, (0, 0, 0, most - mine.shape[0]))
            everyone = padded.new_empty(self.size * most, mine.shape[1])
            dist.all_gather_into_tensor(everyone, padded, group=self.group)
            whole = mine.new_empty(total, mine.shape[1])
            for (start, stop), rows in zip(spans, everyone.split(most)):
                whole[start:stop] = rows[: stop - start]
            return whole

        return gather


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
        parameter.shard_rows = rows
        return parameter


def waiting_rows(parameter: Tensor) -> Tensor | None:
    """The rows that :class:`RowShards` laid beside a parameter."""
    return getattr(parameter, "shard_rows", None)
