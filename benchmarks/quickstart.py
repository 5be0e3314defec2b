"""The demo behind ``make quickstart``: fine-tune the embedded model under ZeRO-3 on 2 CPU ranks, dense and sparse.

Both runs see the same batches in the same order; only ``sparse_lora.enabled`` differs. Ends with a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparselora_dist.engines.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/zero3_sparse.json"
RANKS = 2
_POLL_SECONDS = 0.5
_LOG_TAIL = 4000


def train(name: str, overrides: list[str]) -> dict[str, Any]:
    """One run through the deepspeed launcher; its summary. Output goes to a log file, progress to the terminal."""
    output = ROOT / "runs" / "quickstart" / name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    metrics, log = output / "metrics.jsonl", output / "train.log"
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        *("--num_gpus", str(RANKS), "--master_port", str(free_port())),
        *("launch/train.py", "--config", CONFIG, "--train.output_dir", str(output.relative_to(ROOT))),
        *("--train.disable_tqdm", "true", *overrides),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # On the CPU also where there is a GPU (sparselora_dist.process.keep_to_cpu).
    env = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        shown = ""
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            shown = show_progress(name, metrics, shown)
    print()
    if process.returncode or not (output / "summary.json").is_file():
        raise SystemExit(
            f"{log.read_text(errors='replace')[-_LOG_TAIL:]}\nthe {name} run failed; the whole log is {log}"
        )
    return json.loads((output / "summary.json").read_text())


def show_progress(name: str, metrics: Path, shown: str) -> str:
    """Redraw the progress line on a terminal; elsewhere print it now and then."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    row = json.loads(lines[-1]) if lines else {"step": 0}
    terminal = sys.stdout.isatty()
    text = f"  {name:6s} step {row['step']:4d}"
    if "loss" in row:
        text += f"   loss {row['loss']:.3f}   {row['sparsity/context_share']:.0%} of tokens sparse"
    if terminal and text != shown:
        print(f"\r{text}", end="", flush=True)
    elif not terminal and row["step"] % 40 == 0 and text != shown:
        print(text, flush=True)
    return text


def table(dense: dict[str, Any], sparse: dict[str, Any]) -> str:
    """The comparison that the demo ends with."""
    rows: list[tuple[str, str, str]] = [("", "dense LoRA", "SparseLoRA")]

    def row(label: str, key: str, form: str) -> None:
        rows.append((label, format(dense[key], form), format(sparse[key], form)))

    row("eval loss before", "eval_loss_start", ".4f")
    row("eval loss after", "eval_loss", ".4f")
    row("exact-match accuracy before", "eval_exact_match_start", ".1%")
    row("exact-match accuracy after", "eval_exact_match", ".1%")
    row("tokens computed sparsely", "context_share", ".1%")
    row("FLOPs executed", "executed_flops_share", ".1%")
    row("tokens/s (2 CPU ranks)", "tokens_per_second", ",.0f")
    row("adapter (PEFT format)", "adapter", "s")
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = ["  ".join([r[0].ljust(widths[0]), r[1].rjust(widths[1]), r[2].rjust(widths[2])]) for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_known_args()
    overrides = sys.argv[1:]
    print(f"Fine-tuning the embedded Llama (demo/) under ZeRO-3 on {RANKS} CPU ranks, by {CONFIG}")
    print("The first start compiles one of DeepSpeed's operators (about 30 s).")
    sparse = train("sparse", overrides)
    dense = train("dense", ["--sparse_lora.enabled", "false", *overrides])
    print(f"\n{table(dense, sparse)}\n")
    ratio = sparse["tokens_per_second"] / dense["tokens_per_second"]
    print(f"Both saw the same {sparse['tokens']:,} tokens in the same order. Speed here: {ratio:.2f}x dense.")
    print("A model this small is dominated by overhead; for the speed at real layer widths run")
    print("  .venv/bin/python benchmarks/step_time.py")


if __name__ == "__main__":
    main()
