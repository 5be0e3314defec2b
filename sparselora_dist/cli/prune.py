"""``sparselora-dist prune``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..process import messages

DESCRIPTION = """\
Prune a model, half of its weights or N of every M kept, layer by layer, into a folder that every user of Transformers
loads.

  sparselora-dist prune --model M --method wanda --sparsity 0.5 --data train.jsonl --output M-50
  sparselora-dist prune --model M --method sparsegpt --pattern 2:4 --data train.jsonl --output M-2of4
  torchrun --nproc-per-node 8 -m sparselora_dist.cli prune --model M --method wanda --pattern 2:4 --data D --output O

One layer is in memory at a time, and the calibration tokens' hidden states. The zeros are the same at any number of ranks.
Started again it goes on after the last layer that was written. pruning.json in the folder says how it was made.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``prune``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="in safetensors, not quantised")
    parser.add_argument("--method", default="wanda", help="magnitude, wanda, ria or sparsegpt (default wanda)")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--sparsity", type=float, metavar="SHARE", help="of zeros, such as 0.5")
    amount.add_argument("--pattern", metavar="N:M", help="N kept of every M, such as 2:4")
    amount.add_argument("--layer-sparsity", type=Path, metavar="FILE.json", help="a list with the share of each layer")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="on the model: zeros are chosen of both merged")
    parser.add_argument("--data", metavar="FILE_OR_NAME", help="calibration rows, as data.train; not for magnitude")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="calibration sequences (default 128)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="their tokens (default: 2048, or the model's positions)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to be made; must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Prune and say what was written; 0.

    Raises:
        ValueError, OSError: see :func:`sparselora_dist.pruning.prune.prune`.
    """
    from ..engines.ranks import met
    from ..pruning.pattern import Pattern
    from ..pruning.prune import Pruning, prune, read_shares

    messages()
    shares = None
    if arguments.layer_sparsity:
        shares = read_shares(arguments.layer_sparsity)
        pattern = Pattern.share(sum(shares) / len(shares))
    else:
        pattern = Pattern.parse(arguments.pattern) if arguments.pattern else Pattern.share(arguments.sparsity)
    asked = Pruning(
        model=arguments.model,
        method=arguments.method,
        pattern=pattern,
        output=arguments.output,
        data=arguments.data,
        sequences=arguments.sequences,
        length=arguments.length,
        layer_sparsity=shares,
        adapter=arguments.adapter,
    )
    with met() as (device, speaks):
        record = prune(asked, device)
    if speaks:
        zeros = [share for layer in record["layers"].values() for share in layer.values()]
        print(
            f"{arguments.output}: {arguments.method} {pattern}, {len(zeros)} matrices in {len(record['layers'])} layers, "
            f"zeros {min(zeros):.2%} to {max(zeros):.2%}"
        )
    return 0
