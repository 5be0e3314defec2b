"""``sparselora-dist calibrate``."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from ..process import importing, messages

DESCRIPTION = """\
Measure, on your own data, how much loss each layer and channel group costs at each sparsity, and choose the sparsities
that meet a FLOP target at the least predicted loss. Forward only, on the engine of the run file:

  sparselora-dist calibrate --config RUN.json --target-flops 0.5 --output DIR
  torchrun --nproc-per-node 8 -m sparselora_dist.cli calibrate --config RUN.json --target-flops 0.5 --output DIR
  deepspeed --module sparselora_dist.cli calibrate --config RUN.json --target-flops 0.5 --output DIR

Started again with the same --output it goes on where it was stopped; with another target it only chooses again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``calibrate``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="RUN.json", help="the run: model, data, adapter, engine")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="with --data, instead of --config: one process")
    parser.add_argument("--data", metavar="FILE_OR_NAME", help="training data, with --model")
    parser.add_argument(
        "--target-flops", type=float, required=True, metavar="SHARE", help="of dense LoRA's FLOPs, such as 0.5"
    )
    parser.add_argument(
        "--groups",
        default="",
        metavar="LIST",
        help="what may be sparse: ffn,qk,vo,experts (default: what the model has)",
    )
    parser.add_argument(
        "--levels", default="0.25,0.5,0.75,0.9,0.97,0.99", metavar="LIST", help="sparsities (default %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows to measure on (default 64)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="rows of a micro-batch over all ranks (default: from 8, by the ranks)"
    )
    parser.add_argument(
        "--criterion",
        choices=("loss", "importance"),
        default="loss",
        help="choose by measured loss, or by the layers' representations alone (one dense pass; default loss)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to, and resume from")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and say what was chosen; 0.

    Raises:
        ValueError, OSError: see :func:`sparselora_dist.quality.calibrate.calibrate`, and bad arguments.
    """
    with importing():
        from ..config import ConfigError, RunConfig
        from ..quality.calibrate import Calibration, calibrate

    messages()
    if bool(arguments.config) == bool(arguments.model or arguments.data):
        raise ConfigError("give either --config, or --model and --data")
    if arguments.config:
        config = RunConfig.from_file(arguments.config)
    elif arguments.model and arguments.data:
        config = RunConfig.from_dict(
            {
                "model": {"name_or_path": arguments.model},
                "data": {"train": arguments.data},
                "train": {"output_dir": str(arguments.output)},
            }
        )
    else:
        raise ConfigError("--model and --data belong together")
    calibration = Calibration(
        target_flops=arguments.target_flops,
        groups=tuple(group.strip() for group in arguments.groups.split(",") if arguments.groups),
        levels=_levels(arguments.levels),
        rows=arguments.rows,
        batch=arguments.batch,
        criterion=arguments.criterion,
        output=arguments.output,
        command=shlex.join(["sparselora-dist", *sys.argv[1:]]),
    )
    curves = calibrate(config, calibration)
    if int(os.environ.get("RANK", 0)):
        return 0
    choice, flops = curves["choice"], curves["flops"]
    logging.getLogger(__name__).info(
        "%s: %s; %.1f %% of dense LoRA's FLOPs, loss %.4f %+.4f",
        arguments.output / "sparse_lora.json",
        choice["layers"],
        100 * flops["chosen_share"],
        curves["dense_loss"],
        choice["measured_loss_increase"],
    )
    return 0


def _levels(text: str) -> tuple[float, ...]:
    from ..config import ConfigError

    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"'--levels' is {text!r}: allowed: sparsities, such as 0.5,0.9,0.99") from error
