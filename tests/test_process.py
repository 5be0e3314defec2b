"""How one of several ranks ends, and what torchrun makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

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
