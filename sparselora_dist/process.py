"""How a command begins and ends as a process, alone or as one of several ranks."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def messages() -> None:
    """Show the project's messages as they are, one line each."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparselora_dist").setLevel(logging.INFO)


def keep_to_cpu() -> None:
    """``DS_ACCELERATOR=cpu`` means the whole run, not DeepSpeed alone: hide the GPUs before CUDA starts.

    Here, because DeepSpeed's launcher sets ``CUDA_VISIBLE_DEVICES`` of its ranks anew.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def quiet_bitsandbytes() -> None:
    """PEFT imports bitsandbytes, which complains of an optional CPU kernel that nothing here uses."""
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process with its status; a rank that fails says which one it is."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        status = main()
    except BaseException as error:
        if not several:
            raise
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"(rank {os.environ.get('RANK', '0')} failed)", file=sys.stderr)
        status = 1
    if several:
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    """End one of several ranks at once.

    After success everything is saved and the process group is closed, but gloo's threads abort the interpreter's own exit
    in about one FSDP2 run of ten, which would report a finished job as failed. After a failure the interpreter's exit could
    wait for ranks that are stuck.
    """
    if status == 0 and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
