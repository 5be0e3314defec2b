"""SIGKILL at random moments of runs that may restart, and whether they end where a run ends that nothing happened to.

    python benchmarks/kills.py --kills 20 --engines fsdp2 zero3 --seed 1 --output benchmarks/results/kills.md

Two ranks under ``torchrun --max-restarts``, a checkpoint every 3 steps, ``train.resume`` auto. Each time ranks appear, one
of them and a moment are drawn: from now until the length of an undisturbed life, so also while the run loads, while a
checkpoint is written, and while the run ends. A run that is through before its moment is over; the next one begins in a
folder of its own, with the next seed, until there were so many kills. Every run must end with status 0 and with the losses
and the adapter of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from faults import SAVE, TORCHRUN, alive, losses, run_file, start, wait

NOTHING = "none all never"
LIMIT = 900.0
"""Seconds after which a run hangs."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    rank: int
    after: float
    """Seconds since the ranks had appeared."""
    phase: str
    """What the rank did, by its heartbeat's words."""

    def __str__(self) -> str:
        return f"{self.after:.1f} s, rank {self.rank}, {self.phase}"


def ranks_of(config: Path) -> dict[int, int]:
    """Rank -> process, of those that run this file now; without torchrun itself."""
    found = {}
    for pid in alive(config):
        with suppress(OSError, KeyError):
            words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            found[int(dict(word.partition("=")[::2] for word in words)["RANK"])] = pid
    return found


def disturbed(config: Path, most: int, seed: int, life: float) -> tuple[list[Kill], int | None]:
    """A run with at most so many kills, and its status; None where it did not end."""
    draw, kills, seen = random.Random(seed), [], set()
    phases = config.with_suffix(".phases")
    os.environ["FAULT_PHASES"] = str(phases)
    (process,), _ = start((*TORCHRUN, "--max-restarts", str(most + 1)), config, NOTHING)
    deadline = time.monotonic() + LIMIT
    try:
        while process.poll() is None and time.monotonic() < deadline:
            ranks = ranks_of(config)
            if len(kills) == most or len(ranks) < 2 or seen & set(ranks.values()):
                time.sleep(0.05)
                continue
            rank, after = draw.randrange(2), draw.uniform(0.0, life)
            seen |= set(ranks.values())
            if not wait(lambda: process.poll() is not None, after):
                with suppress(ProcessLookupError):
                    os.kill(ranks[rank], signal.SIGKILL)
                    kills.append(Kill(rank, after, phase(ranks[rank], phases)))
        return kills, process.poll()
    finally:
        for pid in alive(config):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def phase(pid: int, phases: Path) -> str:
    """What a process did last; ``fault_rank.py`` writes it down."""
    lines = phases.read_text().splitlines() if phases.is_file() else []
    found = [words for own, _, words in (line.partition(" ") for line in lines) if own == str(pid)]
    return found[-1] if found else "before the ranks had met"


def outcome(folder: Path) -> tuple[list[tuple[float, float]], str]:
    """Losses, and a hash of the adapter."""
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return losses(folder), hashlib.sha256(weights).hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each engine")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--engines", nargs="+", default=["fsdp2"], choices=["fsdp2", "zero3"])
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    settings = {"max_steps": options.steps, "eval_steps": options.steps // 2, "save_total_limit": 2}
    rows = [
        "| engine | run's seed | kills: seconds after the ranks' start, rank, where it was | status | equal |",
        "|---|---:|---|---:|---|",
    ]
    print("\n".join(rows), flush=True)
    sums, bad = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for engine in options.engines:
            config = run_file(folder, engine, f"whole-{engine}", settings)
            began = time.monotonic()
            (process,), log = start(TORCHRUN, config, NOTHING)
            if process.wait(LIMIT):
                raise SystemExit(log.read_text()[-3000:])
            life, whole = time.monotonic() - began, outcome(folder / f"whole-{engine}")
            done, equal, runs, seed = 0, 0, 0, options.seed
            while done < options.kills:
                config = run_file(folder, engine, f"{engine}-{seed}", settings)
                kills, status = disturbed(config, options.kills - done, seed, life)
                same = status == 0 and outcome(folder / f"{engine}-{seed}") == whole
                places = "; ".join(map(str, kills)) or "none"
                rows.append(f"| {engine} | {seed} | {places} | {status} | {'yes' if same else 'NO'} |")
                print(rows[-1], flush=True)
                if not same:
                    print(config.with_suffix(".log").read_text(errors="replace")[-3000:], file=sys.stderr)
                done, equal, runs, seed = done + len(kills), equal + same * len(kills), runs + 1, seed + 1
                bad += not same
                if not (same or kills):
                    break  # It fails by itself.
            sums.append(
                f"{engine}: {equal} of {done} kills in runs that ended equal ({runs} runs of {options.steps} steps, a "
                f"checkpoint every {SAVE}): {len(whole[0])} losses and the adapter ({whole[1]}) bit for bit. An undisturbed "
                f"life takes {life:.1f} s."
            )
            print(sums[-1], flush=True)
    if options.output:
        words = " ".join(["python benchmarks/kills.py", *sys.argv[1:]])
        head = f"# SIGKILL at random moments\n\n`{words}`; two ranks on one machine of {os.cpu_count()} CPU cores.\n\n"
        options.output.write_text(head + "\n\n".join(sums) + "\n\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
