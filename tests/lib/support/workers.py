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
LONG = (
    *("engines", "quantized", "integration/test_faults.py", "integration/test_guides.py", "integration/test_launch.py"),
    *("integration/test_objectives.py", "integration/test_trainer_pages.py", "integration/test_axolotl.py"),
    *(
        "integration/test_placement.py",
        "pruning/test_prune.py",
        "quality/test_calibrate.py",
        "quantizing/test_quantize.py",
    ),
    *("kernels/test_aot.py", "kernels/test_jit_launches.py", "benchmarks/test_gpu.py", "benchmarks/test_gpu_train.py"),
    *("layers/test_operation_budget.py", "layers/test_compile.py", "quality/test_benchmark.py"),
)
"""What takes longest for its number of tests. It begins first: a long file that begins last leaves the other cores idle,
and pytest-xdist would begin with the files of most tests."""
assert all((ROOT / "tests" / name).exists() for name in LONG), "a name of LONG is no longer there"


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
        longest_first = sorted(self.workqueue, key=lambda scope: scope.removeprefix("tests/") not in LONG)
        found = next((scope for scope in longest_first if starts_ranks(scope) == wanted), longest_first[0])
        self.workqueue.move_to_end(found, last=False)
        super()._assign_work_unit(node)

    @staticmethod
    def _open(work: dict[str, dict[str, bool]]) -> list[str]:
        return [scope for scope, tests in work.items() if not all(tests.values())]
