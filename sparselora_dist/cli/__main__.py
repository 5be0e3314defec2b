"""``python -m sparselora_dist.cli``: what launchers of several ranks start."""

from __future__ import annotations

from ..process import run_and_leave
from . import main

if __name__ == "__main__":
    run_and_leave(main)
