"""The command ``sparselora-dist``: one module per subcommand, imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ..process import keep_to_cpu, quiet_bitsandbytes

COMMANDS = {
    "plan": "what fits on which GPUs, what a step moves and computes, and which layout to choose",
    "calibrate": "measure every layer's sensitivity to sparsity on your data, and choose for a FLOP target",
    "inspect": "how well the estimator chooses on your data, and a report of a run",
    "factors": "estimator factors weighted by what the training rows bring, as a file for sparse_lora.factors",
    "schema": "the JSON Schema of a run file, for editors",
    "prune": "put zeros in the place of the weights that matter least, layer by layer",
    "losa": "prune and tune in rounds, each layer with a sparsity and a rank of its own",
    "quantize": "store the weights in few bits, layer by layer, with calibration data, once",
    "merge": "merge an adapter into its base model, shard by shard",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sparselora-dist <command> ...``; the exit status: 0, 1 (the command says no) or 2 (bad input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Given by the deepspeed launcher, ahead of the other arguments; the ranks come from the environment.
    words = words[1:] if words and words[0].startswith(("--local_rank=", "--local-rank=")) else words
    parser = argparse.ArgumentParser(prog="sparselora-dist", description="Tools around sparse LoRA fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if words[:1] == [name]:
            import_module(f".{name}", __package__).add_arguments(command)
    arguments = parser.parse_args(words)
    keep_to_cpu()
    quiet_bitsandbytes()
    try:
        return import_module(f".{arguments.command}", __package__).run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
