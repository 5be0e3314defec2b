"""``launch/train.py`` with one fault in it, for ``benchmarks/faults.py`` and the tests.

    FAULT="kill 1 backward of step 3" torchrun --nproc-per-node 2 benchmarks/fault_rank.py --config RUN.json

The words are what happens, to which rank, and in which phase, as the heartbeat calls it. ``FAULT_ONCE`` names a file that
is made when it happens, after which it does not happen again: a restarted run is left alone. ``FAULT_PHASES`` names a file
to which every rank adds its process and phase, whenever that changes.

    kill     SIGKILL                        stop     SIGSTOP
    memory   torch.OutOfMemoryError         nan      a gradient is not a number; the loss is
    cut      its network (the link FAULT_LINK)  full    no file may grow beyond 4 kB
    torn     SIGKILL between writing a checkpoint and publishing it
    slow     every batch takes a second, from that phase on
    none     nothing, but the phase is noticed
"""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora_dist.process import run_and_leave

if TYPE_CHECKING:
    from sparselora_dist.sync.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parents[1]
ACTION, RANK, PHASE = os.environ["FAULT"].split(" ", 2)
ONCE = Path(os.environ.get("FAULT_ONCE", os.devnull))


def happen() -> None:
    if ACTION in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if ACTION == "kill" else signal.SIGSTOP)
    elif ACTION == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif ACTION == "cut":
        subprocess.run(["ip", "link", "set", "dev", os.environ["FAULT_LINK"], "down"], check=True)
    elif ACTION == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif ACTION == "torn":
        from sparselora_dist.io import checkpoint

        checkpoint.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    elif ACTION == "nan":
        _spoil_a_gradient()
    elif ACTION == "slow":
        _slow_batches()


def until_read(beat: Heartbeat) -> None:
    """Until the other ranks have read what this one does now, however slow the machine is."""

    def counts() -> dict[int, int]:
        return {rank: peer.count for rank, peer in list(beat._peers.items())}

    # Each beat writes and then reads: whoever has begun the next but one has read what was there before.
    told, read = beat._count + 2, None
    while beat._count < told or read is None or any(counts()[rank] < count + 2 for rank, count in read.items()):
        if beat._count >= told and read is None:
            read = counts()
        time.sleep(0.02)


def _spoil_a_gradient() -> None:
    """From here on, where backward begins: the loss that is reported stays as it is."""
    import torch

    backward = torch.Tensor.backward

    def spoilt(self: torch.Tensor, *args: object, **options: object) -> None:
        backward(self * float("nan"), *args, **options)  # type: ignore[arg-type]

    torch.Tensor.backward = spoilt  # type: ignore[method-assign]


def _slow_batches() -> None:
    from sparselora_dist.train.feed import Feed

    inputs = Feed.inputs

    def slow(self: Feed, *args: object) -> object:
        time.sleep(1.0)
        return inputs(self, *args)  # type: ignore[arg-type]

    Feed.inputs = slow  # type: ignore[method-assign, assignment]


def arm() -> None:
    """Let the fault happen when its phase begins on its rank."""
    from sparselora_dist.sync.heartbeat import Heartbeat

    at = Heartbeat.at

    def noticed(self: Heartbeat, phase: str) -> None:
        at(self, phase)
        if "FAULT_PHASES" in os.environ:
            with open(os.environ["FAULT_PHASES"], "a") as file:
                file.write(f"{os.getpid()} {phase}\n")
        if phase == PHASE and RANK in ("all", os.environ.get("RANK", "0")):
            if "FAULT_ONCE" in os.environ and ONCE.exists() and RANK != "all":
                return
            if ACTION in ("kill", "stop", "cut") and self.active:
                until_read(self)  # In the middle of the phase.
            if "FAULT_ONCE" in os.environ:
                ONCE.touch()
            happen()

    Heartbeat.at = noticed  # type: ignore[method-assign]


def launched() -> Callable[[], int]:
    """``main`` of ``launch/train.py``."""
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def main() -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arm()
    return launched()()


if __name__ == "__main__":
    run_and_leave(main)
