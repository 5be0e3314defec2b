"""Do the engines train the same model? One process, ZeRO-3, FSDP2 and an MPI start on the same global batches.

    python benchmarks/agreement.py --model M --train T.jsonl --eval E.jsonl [--steps 60] [--load-in-4bit]

Every run is sparse; one more is dense. Prints, against one process: the largest relative difference of a step's loss, the
share of kept channels that differ (summed over steps, layers and groups: near-tied scores whose order the summation
flips), and the evaluation loss before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sparselora_dist.engines.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
LAYERS = {"ffn": {"2-6": 0.9}, "qk": {"3-6": 0.5}, "vo": {"3-6": 0.5}}


def worker(config_file: str) -> None:
    """One rank of a run; rank 0 leaves the masks of every step in the output folder."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import loop, run

    masks: list[dict[tuple[int, str], torch.Tensor]] = []

    class Watched(loop.TrainingLoop):
        def _optimize(self, *args: Any) -> Any:
            result = super()._optimize(*args)
            last = self.context.last
            masks.append({key: mask.cpu() for key, mask in last.masks.items()} if last else {})
            return result

    sys.modules["sparselora_dist.train.run"].TrainingLoop = Watched  # type: ignore[attr-defined]
    config = RunConfig.from_file(config_file)
    run(config)
    if os.environ.get("RANK", "0") == "0":
        torch.save(masks, Path(config.train.output_dir) / "masks.pt")
    sys.stdout.flush()
    os._exit(0)  # See launch/train.py.


def launch(name: str, start: list[str], engine: str, ranks: int, sparse: bool, options: argparse.Namespace) -> Path:
    """Run one way; its output folder."""
    output = Path(options.output) / name
    shutil.rmtree(output, ignore_errors=True)  # A finished run is never trained over.
    output.mkdir(parents=True)
    config = {
        "model": {"name_or_path": options.model, "dtype": "float32"},
        "sparse_lora": {"enabled": sparse, "layers": LAYERS, "start_step": 0.05},
        "data": {"train": options.train, "eval": options.eval, "max_length": 512},
        "train": {
            "output_dir": str(output),
            "max_steps": options.steps,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8 // ranks,
            "disable_tqdm": True,
        },
        "quantization": {"load_in_4bit": options.load_in_4bit},
        "engine": {"name": engine},
    }
    (output / "config.json").write_text(json.dumps(config))
    bin_ = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [*start, __file__, "--worker", str(output / "config.json")]
    with open(output / "log.txt", "wb") as log:
        subprocess.run(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not (output / "masks.pt").is_file():
        raise SystemExit(f"{name} failed; see {output / 'log.txt'}")
    return output


def differing(reference: list[dict], other: list[dict]) -> tuple[int, int]:
    """Kept channels of all steps that only one side has, and all kept channels."""
    different = total = 0
    for ours, theirs in zip(reference, other, strict=True):
        assert ours.keys() == theirs.keys()
        for key, mask in ours.items():
            total += mask.numel()
            different += int((~torch.isin(mask, theirs[key])).sum())
    return different, total


def main() -> None:
    if "--worker" in sys.argv:  # The deepspeed launcher puts --local_rank first.
        return worker(sys.argv[-1])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--load-in-4bit", action="store_true", help="NF4 frozen weights")
    parser.add_argument("--output", default="runs/agreement")
    options = parser.parse_args()
    bin_ = Path(sys.executable).parent
    python, torchrun = [sys.executable], [str(bin_ / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS)]
    deepspeed = [str(bin_ / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", str(free_port())]
    ways = [
        ("one process", python, "single", 1, True),
        ("ZeRO-3, deepspeed, 2 ranks", deepspeed, "zero3", RANKS, True),
        ("FSDP2, torchrun, 2 ranks", torchrun, "fsdp2", RANKS, True),
        ("ZeRO-3, mpirun, 2 ranks", [str(bin_ / "mpirun"), "-n", str(RANKS), sys.executable], "zero3", RANKS, True),
        ("one process, dense", python, "single", 1, False),
    ]
    print("| run | loss differs by at most | kept channels that differ | eval loss before | eval loss after |")
    print("|---|---|---|---|---|")
    reference_losses: list[float] = []
    reference_masks: list[dict] = []
    for name, start, engine, ranks, sparse in ways:
        folder = launch(name.replace(",", "").replace(" ", "_"), start, engine, ranks, sparse, options)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses, masks = [row["loss"] for row in rows if "loss" in row], torch.load(folder / "masks.pt")
        summary = json.loads((folder / "summary.json").read_text())
        reference_losses, reference_masks = reference_losses or losses, reference_masks or masks
        loss = max(abs(a - b) / a for a, b in zip(reference_losses, losses, strict=True))
        cells = ["", ""]
        if sparse:
            different, total = differing(reference_masks, masks)
            cells = [f"{loss:.1e}", f"{different} of {total:,} ({different / total:.4%})"]
        print(
            f"| {name} | {' | '.join(cells)} | {summary['eval_loss_start']:.4f} | {summary['eval_loss']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
