"""What each rank has to say, known to all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def everyone(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``mine`` of every rank, by rank: objects that pickle. A collective of a group, or of all ranks."""
    found = [mine] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
