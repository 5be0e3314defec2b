"""``python -m sparselora_dist.cli``: what launchers of several ranks start."""

from __future__ import annotations

import os
import sys
import traceback

from . import main


def _leave(status: int) -> None:
    """End one of several ranks at once: the interpreter's own exit can abort in gloo, or wait for ranks that are stuck."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        status = main()
    except Exception:
        if not several:
            raise
        traceback.print_exc()
        print(f"(rank {os.environ.get('RANK', '0')} failed)", file=sys.stderr)
        status = 1
    if several:
        _leave(status)
    sys.exit(status)
