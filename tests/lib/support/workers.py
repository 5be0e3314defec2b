"""Which tests run beside which, where pytest has several workers (``make test``).

A file's tests stay together, because they share what is costly to set up; those of some folders do. One worker takes the
files that start ranks, which need both cores; the others take the rest first.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[3]
_WITH_RANKS = ("engines", "integration", "quantized", "sync")
_SHARING = ("engines", "quantized")
"""Folders whose ranks are started once for all files."""


def unit(file: str) -> str:
    """What a test file, named from the repository's root, is run together with."""
    folder = Path(file).parent
    return str(folder) if folder.name in _SHARING else file


@cache
def starts_ranks(unit: str) -> bool:
    path = ROOT / unit
    if path.is_dir() or path.parent.name in _WITH_RANKS:
        return True
    return "support.harness" in path.read_text(encoding="utf-8")


class ByRanks(LoadScopeScheduling):
    """Where a worker is in a file with ranks, the next one gets a file without, as long as there is one."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid.partition("::")[0])

    def _assign_work_unit(self, node: Any) -> None:
        others = [
            scope for other, work in self.assigned_work.items() if other is not node for scope in self._open(work)
        ]
        wanted = not any(map(starts_ranks, others))
        found = next((scope for scope in self.workqueue if starts_ranks(scope) == wanted), None)
        if found is not None:
            self.workqueue.move_to_end(found, last=False)
        super()._assign_work_unit(node)

    @staticmethod
    def _open(work: dict[str, dict[str, bool]]) -> list[str]:
        return [scope for scope, tests in work.items() if not all(tests.values())]
