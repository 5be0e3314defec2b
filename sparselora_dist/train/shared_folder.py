"""Whether every host sees the folder that rank 0 writes: looked up, once, at the start."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from ..sync.everyone import everyone

log = logging.getLogger(__name__)


def check_shared(folder: Path, resume: bool | str) -> None:
    """A collective, after rank 0 made the folder. Rank 0 alone writes, but a run that continues is read by all.

    Args:
        folder: ``train.output_dir``.
        resume: ``train.resume``.

    Raises:
        ValueError: a host does not see what rank 0 writes, and the run is to continue from there; the hosts are named.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with contextlib.ExitStack() as stack:
        name = ""
        if dist.get_rank() == 0:
            # A name that no host can have looked up, and remember as missing.
            name = Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-")).name).name
        names = everyone(name)
        found = everyone((socket.gethostname(), (folder / names[0]).exists()))
    writer = found[0][0]
    blind = ", ".join(dict.fromkeys(host for host, sees in found if not sees))
    if not blind:
        return
    what = (
        f"train.output_dir {folder} is not the same folder on all hosts: {blind} cannot see what {writer} writes there"
    )
    if resume is True or resume == "auto":
        raise ValueError(
            f"{what}, and with train.resume {resume} ranks would continue on one host and start anew on another: put it on "
            "storage that all hosts share"
        )
    if dist.get_rank() == 0:
        log.warning(
            "%s. Checkpoints and the adapter will be on %s alone, and train.resume will not find them", what, writer
        )
