"""How one of several ranks ends, and what torchrun makes of it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sparselora_dist.process import importing

PROGRAM = """
from sparselora_dist.process import SaidElsewhere, complain, run_and_leave
def main():
    {ending}
run_and_leave(main)
"""
CAUSES = ("raise MemoryError('out of memory')", "complain('out of memory'); return 2")


@pytest.mark.parametrize("cause", CAUSES)
def test_torchrun_repeats_the_rank_that_failed(cause: str, tmp_path: Path) -> None:
    """Not one that ends because of it, which here even ends before."""
    failures = {}
    for rank, ending in enumerate(("raise SaidElsewhere(1)", "return 1", cause)):
        file = tmp_path / f"{rank}.json"
        env = {**os.environ, "WORLD_SIZE": "3", "RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(file)}
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(ending=ending)], env=env, capture_output=True, text=True
        )
        assert process.returncode in (1, 2) and file.is_file(), process.stderr
        assert ("out of memory" in process.stderr) == (rank == 2)
        failures[rank] = ProcessFailure(rank, 1, process.returncode, str(file))
    error = ChildFailedError("train", failures)
    assert error.get_first_failure()[0] == 2
    assert "out of memory" in str(error).rpartition("Root Cause")[2]
    assert "because of another rank" in str(error)


def test_no_garbage_is_looked_for_in_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    # All was there already: what the caller has made is not kept from being collected.
    assert gc.isenabled() and gc.get_freeze_count() == before
    with pytest.raises(RuntimeError, match="broken"), importing():
        monkeypatch.setitem(sys.modules, "imported_first", ModuleType("imported_first"))
        raise RuntimeError("broken")
    assert gc.isenabled() and gc.get_freeze_count() > before
