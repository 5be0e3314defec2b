"""Which tests run beside which, where pytest has several workers (``make test``).

A file's tests stay together, because they share what is costly to set up. Those that start ranks are one queue: one such
test at a time, beside tests that are one process, so that ranks have the cores that they time out without.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).resolve().parents[2]
_RANKS = "ranks"
_WITH_RANKS = ("engines", "integration", "quantized", "sync")


@cache
def queue(file: str) -> str:
    """The queue of a test file, named from the repository's root."""
    path = TESTS.parent / file
    starts_ranks = path.parent.name in _WITH_RANKS or "support.harness" in path.read_text(encoding="utf-8")
    return _RANKS if starts_ranks else file


class ByQueue(LoadScopeScheduling):
    """Queues in the place of files, the longest first."""

    def _split_scope(self, nodeid: str) -> str:
        return queue(nodeid.partition("::")[0])

    def _assign_work_unit(self, node: Any) -> None:
        if _RANKS in self.workqueue:
            self.workqueue.move_to_end(_RANKS, last=False)
        super()._assign_work_unit(node)
