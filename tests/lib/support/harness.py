"""Running a function on several ranks: gloo, a file store (no ports), a timeout, judged by result files."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from support.rank_server import start_rank

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = Path(__file__).resolve().parents[1]


_BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sparselora_dist", "sparselora_kernels"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


def without_package(script: str) -> str:
    """A Python script in which nothing of this project can be imported."""
    return _BLOCK + script


class RankError(AssertionError):
    """A rank failed or did not finish; carries the output of every rank."""


def run_ranks(
    worker: str, world_size: int, *args: Any, timeout: float = 480.0, expect_failure: bool = False
) -> list[Any]:
    """Run ``worker`` (``"support.workers:function"``) with ``args`` on every rank; the results by rank.

    With ``expect_failure`` the ranks are expected to raise; the result of a rank is then its output text.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save((worker, args), Path(folder) / "job.pt")
        ranks = []
        for rank in range(world_size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": "1",
                "PYTHONSAFEPATH": "1",
                # What this process imports from, the ranks import from.
                "PYTHONPATH": os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH")])),
                # Beside the interpreter: the ninja that DeepSpeed builds with must be one and the same everywhere.
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                # DeepSpeed names its shared memory by these; two jobs at once must not share it.
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(abs(hash(folder)) % 50000 + 10000),
                "TOKENIZERS_PARALLELISM": "false",
            }
            ranks.append(start_rank(folder, env, Path(folder) / f"{rank}.log"))
        failed = [
            f"rank {rank} did not finish within {timeout:g} s"
            for rank, process in enumerate(ranks)
            if not process.ended(timeout)
        ]
        for process in ranks:
            process.close()
        logs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        results = [Path(folder) / f"{rank}.result" for rank in range(world_size)]
        if expect_failure:
            return logs
        failed += [f"rank {rank} left no result" for rank, path in enumerate(results) if not path.is_file()]
        if failed:
            tails = "\n".join(f"--- rank {rank}\n{log[-4000:]}" for rank, log in enumerate(logs))
            raise RankError(f"{'; '.join(failed)}\n{tails}")
        return [torch.load(path, weights_only=False) for path in results]


def run_launch(
    command: list[str], timeout: float = 300.0, check: bool = True, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess:
    """Run a launcher command, from the repository's root; ``command[0]`` is looked up beside this interpreter."""
    program = Path(sys.executable).parent / command[0]
    full = [str(program) if program.exists() else command[0], *command[1:]]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        full,
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    if check and result.returncode:
        raise RankError(
            f"{' '.join(command)} exited with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        )
    return result


def work_as_rank(folder: Path) -> NoReturn:
    """Run the folder's job as the rank that the environment names, leave the result there, and end the process."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    worker, args = torch.load(folder / "job.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    module, name = worker.split(":")
    work = getattr(importlib.import_module(module), name)
    # Engines collect garbage when they begin and end, and would look through every imported module each time.
    gc.freeze()
    result = work(*args)
    partial = folder / f"{rank}.partial"
    torch.save(result, partial)
    partial.rename(folder / f"{rank}.result")
    dist.barrier()
    # gloo's threads sometimes abort the interpreter's exit after FSDP2; the result file is what counts.
    os._exit(0)
