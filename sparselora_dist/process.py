"""How a command begins and ends as a process, alone or as one of several ranks."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class SaidElsewhere(SystemExit):
    """This process ends for a reason that another one says."""


def messages() -> None:
    """Show the project's messages as they are, one line each."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparselora_dist").setLevel(logging.INFO)
    # Before torch is imported: its network code would print stacks of C++ over the line that says which rank is missing.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def keep_to_cpu() -> None:
    """``DS_ACCELERATOR=cpu`` means the whole run, not DeepSpeed alone: hide the GPUs before CUDA starts.

    Here, because DeepSpeed's launcher sets ``CUDA_VISIBLE_DEVICES`` of its ranks anew.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def quiet_bitsandbytes() -> None:
    """PEFT imports bitsandbytes, which complains of an optional CPU kernel that nothing here uses."""
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """Import much at once: meanwhile no garbage is looked for, and later none in what was imported, which stays.

    Torch, Transformers and PEFT are a million objects, which Python would look through again and again as they come, and
    DeepSpeed whenever it collects garbage itself. Where all was imported before, nothing changes.
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if len(sys.modules) > known:
                gc.freeze()
                # Or compiled modules would say at the end that they leak.
                atexit.unregister(gc.unfreeze)
                atexit.register(gc.unfreeze)
            gc.enable()


def complain(text: str, hint: str = "") -> None:
    """Say why this process ends, on standard error, and to torchrun, whose summary repeats it as the last of all."""
    where = f"rank {os.environ.get('RANK', '0')}{hint and f'; {hint}'}"
    print(f"error: {text}\n({where})", file=sys.stderr, flush=True)
    _tell_torchrun(text)


def _tell_torchrun(text: str, delay: int = 0) -> None:
    """Leave ``text`` in torchrun's file of this rank. It repeats that of the earliest second; ``delay`` is added here."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()) + delay)}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": said}, file)
    except OSError:
        pass  # It was said on standard error.


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process with its status; a rank that fails says which one it is."""
    try:
        status = main()
    except SaidElsewhere:
        status = 1
    except BaseException as error:
        if not _several():
            raise
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"(rank {os.environ.get('RANK', '0')} failed)", file=sys.stderr)
        _tell_torchrun(str(error) or type(error).__name__)
        status = 1
    if _several():
        leave(status)
    sys.exit(status)


def _several() -> bool:
    """Read when it is needed: mpirun's ranks are known once the run has begun."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def leave(status: int) -> NoReturn:
    """End one of several ranks at once.

    After success everything is saved and the process group is closed, but gloo's threads abort the interpreter's own exit
    in about one FSDP2 run of ten, which would report a finished job as failed. After a failure the interpreter's exit could
    wait for ranks that are stuck.
    """
    if status == 0 and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()
    if status:
        # Not the cause, though it may end within the same second.
        _tell_torchrun("ended because of another rank, which says why", delay=60)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
