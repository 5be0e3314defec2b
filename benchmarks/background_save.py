"""What a checkpoint in the background costs the steps beside which it is written, in one run.

    python benchmarks/background_save.py [--rank 256] [--every 8] [--steps 48] [--output FILE.md]

One process, on the embedded demo model with a large adapter, so that there is something to write. *While a checkpoint is
written*: the writer's thread lived when the step began or ended. The copy that is taken first is a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparselora_dist.config.run import RunConfig
from sparselora_dist.io.background import BackgroundWriter
from sparselora_dist.process import quiet_bitsandbytes
from sparselora_dist.train import run
from sparselora_dist.train.loop import TrainingLoop
from sparselora_dist.train.saving import Saver

ROOT = Path(__file__).resolve().parents[1]


def measured(folder: Path, options: argparse.Namespace, background: bool) -> dict[str, float]:
    """Medians in seconds of one run, and how many steps were taken beside a writer."""
    steps: list[tuple[float, bool]] = []
    copies: list[float] = []
    writers: list[BackgroundWriter] = []
    one_step, save, init = TrainingLoop._one_step, Saver.save, BackgroundWriter.__init__
    began = [time.perf_counter()]

    def busy() -> bool:
        return any(w._thread is not None and w._thread.is_alive() for w in writers)

    def timed_step(self: Any, step: int) -> None:
        # The copy, and in the foreground the writing, of the step before is in what has passed since.
        began[0], before = time.perf_counter(), busy()
        one_step(self, step)
        steps.append((time.perf_counter() - began[0], before or busy()))

    def timed_save(self: Any, step: int, **state: Any) -> None:
        start = time.perf_counter()
        save(self, step, **state)
        copies.append(time.perf_counter() - start)

    def noted(self: Any, background: bool = True) -> None:
        init(self, background)
        writers.append(self)

    TrainingLoop._one_step, Saver.save, BackgroundWriter.__init__ = timed_step, timed_save, noted  # type: ignore
    try:
        run(
            RunConfig.from_dict(
                {
                    "model": {"name_or_path": str(ROOT / "demo/model"), "dtype": "float32"},
                    "lora": {"r": options.rank, "lora_alpha": options.rank, "target_modules": "all-linear"},
                    "data": {"train": str(ROOT / "demo/data/train.jsonl"), "max_length": 128},
                    "train": {
                        "output_dir": str(folder),
                        "max_steps": options.steps,
                        "per_device_train_batch_size": options.batch,
                        "group_by_length": False,
                        "save_steps": options.every,
                        "save_total_limit": 2,
                        "save_in_background": background,
                        "disable_tqdm": True,
                    },
                }
            )
        )
    finally:
        TrainingLoop._one_step, Saver.save, BackgroundWriter.__init__ = one_step, save, init  # type: ignore
    beside = [seconds for seconds, saving in steps[1:] if saving]
    alone = [seconds for seconds, saving in steps[1:] if not saving]
    last = folder / f"checkpoint-{options.steps // options.every * options.every}"
    size = sum(path.stat().st_size for path in last.rglob("*.safetensors"))
    return {
        "step": statistics.median(alone),
        "beside": statistics.median(beside) if beside else float("nan"),
        "count": len(beside),
        "save": statistics.median(copies),
        "size": size / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=256, help="of the adapter")
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    quiet_bitsandbytes()
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        found = {
            kind: measured(Path(name) / kind, options, kind == "background") for kind in ("background", "blocking")
        }
    behind, front = found["background"], found["blocking"]
    rows = [
        "| | blocking | background |",
        "|---|---:|---:|",
        f"| a step without saving, ms | {1e3 * front['step']:.0f} | {1e3 * behind['step']:.0f} |",
        f"| a step while a checkpoint is written, ms (steps) | | {1e3 * behind['beside']:.0f} ({behind['count']:.0f}) |",
        f"| ratio | | {behind['beside'] / behind['step']:.2f} |",
        f"| the training waits for a save, ms | {1e3 * front['save']:.0f} | {1e3 * behind['save']:.0f} |",
        f"| a checkpoint's tensors, MB | {front['size']:.0f} | {behind['size']:.0f} |",
    ]
    print("\n".join(rows))
    if options.output:
        words = " ".join(["python benchmarks/background_save.py", *sys.argv[1:]])
        options.output.write_text(f"# Checkpoints in the background\n\n`{words}`\n\n" + "\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
