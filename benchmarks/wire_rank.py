"""A rank of ``benchmarks/wire.py``: what gloo sends for a collective, or which collectives a step of a run makes.

    wire_rank.py probe OUT.json
    wire_rank.py count OUT.json --config RUN.json

Ranks are numbered host by host. A group is ``all`` of them, a ``pair`` of which each host has one, or ``inside`` a host.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "lib"))

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from support.networks import DEVICE

PROBE = 8 << 20
"""Bytes of the whole tensor of a probed collective."""
CALLS = 100
"""Of a collective of next to nothing."""
COUNTED = 5
"""The step that is counted, from 1: in the steady state."""
_KINDS = {
    **{"_allgather_base_": "all-gather", "allgather_": "all-gather", "all_gather_into_tensor": "all-gather"},
    **{"_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce", "all_reduce": "all-reduce"},
}


def _bytes_sent() -> int:
    dist.barrier()
    return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text())


def probe(out: Path) -> None:
    """Leaves ``{"all-gather/all": [share, fixed], ...}``: this host sends share x the whole tensor's bytes + fixed."""
    dist.init_process_group("gloo")
    world, per_host = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    pairs = [dist.new_group(list(range(first, world, per_host))) for first in range(per_host)]
    groups = {"all": dist.group.WORLD, "pair": pairs[dist.get_rank() % per_host]}
    found = {}
    for place, group in groups.items():
        ranks = dist.get_world_size(group)
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):

            def calls(size: int, kind: str = kind, group: Any = group, ranks: int = ranks) -> Callable[[], Any]:
                whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
                return {
                    "all-gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
                    "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
                    "all-reduce": lambda: dist.all_reduce(whole, group=group),
                }[kind]

            small, large = calls(4 * ranks), calls(PROBE)
            small()  # The first one connects.
            before = _bytes_sent()
            for _ in range(CALLS):
                small()
            between = _bytes_sent()
            large()
            fixed = (between - before) / CALLS
            found[f"{kind}/{place}"] = [(_bytes_sent() - between - fixed) / PROBE, fixed]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """``with Collectives() as seen``: ``seen.found``: kind/group -> [calls, bytes of the whole tensors]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            name = function.overloadpacket.__name__
            if (group := _group(args)) is not None and name not in ("wait_tensor", "barrier"):
                entry = self.found.setdefault(f"{_KINDS.get(name, name)}/{_place(group)}", [0, 0])
                entry[0] += 1
                # Of an input and an output, the whole one.
                entry[1] += max((_size(arg) for arg in args), default=0)
        return function(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def _group(args: Any) -> dist.ProcessGroup | None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
        if isinstance(arg, str) and arg not in ("sum", "avg", "max", "min"):
            return dist.distributed_c10d._resolve_process_group(arg)
    return None


def _place(group: dist.ProcessGroup) -> str:
    ranks, per_host = dist.get_process_group_ranks(group), int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = [rank // per_host for rank in ranks]
    if len(set(hosts)) == 1:
        return "inside"
    return "all" if len(ranks) == dist.get_world_size() else "pair"


def count(out: Path, config: str) -> None:
    """A run; leaves what :class:`Collectives` found in one of its steps on rank 0."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run
    from sparselora_dist.train.loop import TrainingLoop

    plain = TrainingLoop._one_step

    def counted(self: TrainingLoop, step: int) -> None:
        if step != COUNTED - 1:
            return plain(self, step)
        with Collectives() as seen:
            plain(self, step)
        if self.engine.is_main:
            out.write_text(json.dumps(seen.found))

    TrainingLoop._one_step = counted  # type: ignore[method-assign]
    run(RunConfig.from_file(config))


def main() -> int:
    words = sys.argv[1:]
    if words[0] == "probe":
        probe(Path(words[1]))
    else:
        count(Path(words[1]), words[3])
    return 0


if __name__ == "__main__":
    from sparselora_dist.process import keep_to_cpu, messages, quiet_bitsandbytes, run_and_leave

    keep_to_cpu()
    messages()
    quiet_bitsandbytes()
    run_and_leave(main)
