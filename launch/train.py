"""Fine-tune by one config file.

    python launch/train.py --config configs/single_sparse.json
    torchrun --nproc-per-node 8 launch/train.py --config configs/fsdp2_sparse.json
    deepspeed launch/train.py --config configs/zero3_sparse.json
    mpirun -n 8 python launch/train.py --config configs/zero3_sparse.json

Every key of the file can be set from here: ``--train.max_steps 100 --sparse_lora.enabled false``.
"""

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from sparselora_dist.process import messages, quiet_bitsandbytes, run_and_leave

if TYPE_CHECKING:
    from sparselora_dist.config.run import RunConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run, as JSON or YAML")
    # Given by the deepspeed launcher, ahead of the other arguments; the ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()

    messages()
    quiet_bitsandbytes()

    from sparselora_dist.config.run import RunConfig

    try:
        config = RunConfig.from_file(arguments.config, overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from sparselora_dist.train import run

    try:
        summary = run(config)
    except (ValueError, OSError) as error:
        if os.environ.get("SPARSELORA_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}\n(rank {rank}; SPARSELORA_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(closing_words(config, summary))
    return 0


def closing_words(config: "RunConfig", summary: dict[str, Any]) -> str:
    """What the run reached, where the adapter is, and what comes next."""
    from sparselora_dist.io.weights import checkpoint_folder

    evaluated = summary["eval_loss"] is not None
    before, after = ("eval_loss_start", "eval_loss") if evaluated else ("train_loss_first", "train_loss_last")
    losses = f"{'evaluation' if evaluated else 'training'} loss {summary[before]:.4f} -> {summary[after]:.4f}"
    if evaluated:
        losses += f", exact match {summary['eval_exact_match_start']:.1%} -> {summary['eval_exact_match']:.1%}"
    rate = summary["tokens_per_second"]
    speed = "" if rate is None else f", {rate:,.0f} tokens/s"
    folder, base = config.train.output_dir, checkpoint_folder(config.model.name_or_path)
    merge = ["sparselora-dist", "merge", "--base", str(base), "--adapter", summary["adapter"]]
    merge += ["--output", os.path.join(folder, "merged"), "--dtype", config.model.dtype]
    if config.quantization.load_in_4bit:
        merge += ["--load-in-4bit", *([] if config.quantization.bnb_4bit_use_double_quant else ["--no-double-quant"])]
    return f"""
{losses}
{summary["executed_flops_share"]:.1%} of plain LoRA's FLOPs{speed}
adapter: {summary["adapter"]} (PEFT's format, with tokenizer and model card)
next:    {shlex.join(["sparselora-dist", "inspect", folder])}
         {shlex.join(merge)}"""


if __name__ == "__main__":
    run_and_leave(main)
