"""Being told to stop: by a signal, by Ctrl-C, or by a launcher that is gone.

A run stops where its ranks agree to: after a step, or between the batches of an evaluation. There it saves. While it loads
there is nothing to save, and a second Ctrl-C does not wait: both end the run at once, and say what is on the disk.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..io.checkpoint import newest_checkpoint
from ..sync.processes import parent

# Of Slurm's and people's: SIGUSR1 is what sbatch --signal sends ahead of the end of the job's time.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
# By these a rank knows that it was started by a launcher that stays while it runs. Plain variables may be set by a shell
# that does not, and Slurm ends the processes of a job itself.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
# A launcher may send two signals for one Ctrl-C; a person takes longer.
_AGAIN = 2.0
_LOOK = 0.5


class Stopped(SystemExit):
    """The run ends because it was told to; the text says what is on the disk."""


class StopSignals:
    """Listens while it is entered.

    Args:
        output_dir: of the run, whose checkpoints the messages name.
        speaks: whether this rank says that it has heard a signal.
    """

    def __init__(self, output_dir: Path, speaks: bool = True) -> None:
        self.asked = ""
        """The signal that was heard, or ""."""
        self.waits = False
        """Whether the run stops by itself once it was asked; before, and after, a signal ends it at once."""
        self.speaks, self._output_dir = speaks, output_dir
        self._when = 0.0
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread; whoever runs there decides.
        for name in _SIGNALS:
            number = getattr(signal, name)
            # nohup and the like have turned it off.
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._heard)
        if any(name in os.environ for name in _LAUNCHERS):
            threading.Thread(target=self._watch_launcher, args=(_ancestors(),), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _heard(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        again = number == signal.SIGINT and self.asked == name and now - self._when > _AGAIN
        if self.waits and not again:
            if not self.asked and self.speaks:
                # Not by logging or print: they may be what the signal has interrupted.
                os.write(2, f"{name}: saving after this step{'; Ctrl-C again ends at once' * (number == 2)}\n".encode())
            self.asked, self._when = self.asked or name, self._when or now
            return
        if not self.asked or again:
            self.asked, self._when = name, now
            raise Stopped(f"{name}: nothing was saved now; {on_disk(self._output_dir)}")

    def _watch_launcher(self, started_by: list[int]) -> None:
        """A launcher that is killed, or ends alone as deepspeed's does, leaves its ranks: they are told as by SIGTERM."""
        while not self._left.wait(_LOOK):
            if _ancestors() != started_by:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def on_disk(output_dir: Path) -> str:
    """What a run has left so far, and how to go on."""
    newest = newest_checkpoint(output_dir)
    if newest is None:
        return f"{output_dir} holds no checkpoint"
    return f'the newest checkpoint is {newest}: train.resume true (or "auto") continues it'


def _ancestors() -> list[int]:
    """The processes that started this one, up to the launcher: its parent and, under deepspeed, which has two, the next."""
    found = [os.getppid()]
    if "CROSS_SIZE" in os.environ and (second := parent(found[0])) is not None:
        found.append(second)
    return found
