"""Processes as a launcher starts them, on hosts that are only said to be several: runs, and who met whom."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .harness import LIBRARY, ROOT, RankError

# What tells a process that it is one of several.
_TAKEN_AWAY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(command: Sequence[str], environments: Sequence[Mapping[str, str]], timeout: float = 240.0) -> list[str]:
    """Run ``command`` once for each of the environments, all at the same time; what each printed.

    Raises:
        RankError: one failed or did not end, with the output of all.
    """
    common = {name: value for name, value in os.environ.items() if name not in _TAKEN_AWAY} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH")])),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    processes = [
        subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**common, **env}, text=True, **pipes)
        for env in environments
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RankError("\n".join(f"--- {i}: {text[-3000:]}" for i, text in enumerate(outputs)))
    return outputs


def main(folder: Path) -> None:
    """The runs of ``jobs.pt`` one after another; leaves ``<launcher's rank>.pt`` with what this process saw of each."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.engines import Engine
    from sparselora_dist.train import run
    from sparselora_dist.train.loop import TrainingLoop

    name = os.environ["SLURM_PROCID"]
    seen: list[dict[str, Any]] = []
    plain = TrainingLoop.run

    def run_and_look(self: Any) -> Any:
        seen.append(
            {"rank": self.engine.ranks.rank, "group": shard_group(self.engine), "hosts": self.engine.ranks.hosts}
        )
        summary = plain(self)
        return summary

    TrainingLoop.run, Engine.close = run_and_look, lambda self: None  # type: ignore[method-assign]
    for config in torch.load(folder / "jobs.pt", weights_only=False):
        run(RunConfig.from_dict(config))
    torch.save(seen, folder / f"{name}.pt")
    os._exit(0)


def shard_group(engine: Any) -> list[int]:
    """The ranks with which this one shares a copy of the weights."""
    import torch.distributed as dist

    if engine.config.engine.name == "zero3":
        from deepspeed.utils import groups

        return list(groups._get_zero_param_intra_parallel_group_ranks())
    return dist.get_process_group_ranks(engine._mesh["shard"].get_group())


def shared(own: list[str], one: str) -> dict[str, Any]:
    """What is said of a folder that both ranks see, and of one on each rank's host: (refused, warnings)."""
    import logging
    import socket

    import torch.distributed as dist

    from sparselora_dist.train import shared_folder

    rank = dist.get_rank()
    socket.gethostname = lambda: f"host{rank}"  # type: ignore[assignment]
    seen: dict[str, Any] = {"rank": rank}
    for name, folder in (("one folder", one), ("own folders", own[rank])):
        words: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, words=words: words.append(record.getMessage())  # type: ignore[method-assign, misc]
        shared_folder.log.addHandler(handler)
        shared_folder.check_shared(Path(folder), False)
        shared_folder.log.removeHandler(handler)
        refused = ""
        try:
            shared_folder.check_shared(Path(folder), "auto")
        except ValueError as error:
            refused = str(error)
        seen[name] = refused, words
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]))
