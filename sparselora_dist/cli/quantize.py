"""``sparselora-dist quantize``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..process import messages

DESCRIPTION = """\
Store a model's weights in few bits, layer by layer, once: into a folder that runs load as it is.

  sparselora-dist quantize --model M --format billm --data train.jsonl --output M-billm
  sparselora-dist quantize --model M --format bcq --bits 3 --data train.jsonl --output M-bcq3
  torchrun --nproc-per-node 8 -m sparselora_dist.cli quantize --model M --format billm --data D --output O

With --data the error of each block of inputs is made up for by those that follow, on what the model makes of the data.
Without, hqq, bcq, shiftadd and fp8 store what a run with the same quantization.format makes at each start.
One layer is in memory at a time, and the calibration tokens' hidden states. The bytes are the same at any number of ranks.
--loftq takes the file of a run with "lora": {"init_lora_weights": "loftq", ...}: what storing takes away, as far as that
adapter can hold it, is where a run over the folder then starts.
Started again it goes on after the last layer that was written. quantization.json in the folder says how it was made.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``quantize``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="in safetensors, not quantised")
    parser.add_argument("--format", required=True, help="billm, bcq, shiftadd, hqq or fp8")
    parser.add_argument("--bits", type=int, metavar="B", help="of hqq and bcq (default 4) and shiftadd (3): 2, 3 or 4")
    parser.add_argument("--compensate", metavar="HOW", help="exact (default with --data), diagonal or none")
    parser.add_argument("--data", metavar="FILE_OR_NAME", help="calibration rows, as data.train")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="calibration sequences (default 128)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="their tokens (default: 2048, or the model's positions)"
    )
    parser.add_argument(
        "--loftq",
        type=Path,
        metavar="RUN.json",
        help="write the start of this run's adapter too, into OUTPUT/loftq_init",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to be made; must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Quantise and say what was written; 0.

    Raises:
        ValueError, OSError: see :func:`sparselora_dist.quantizing.quantize.quantize`.
    """
    from ..engines.ranks import met
    from ..quantizing.quantize import Quantizing, quantize
    from ..quantizing.start import lora_of

    messages()
    asked = Quantizing(
        model=arguments.model,
        format=arguments.format,
        output=arguments.output,
        bits=arguments.bits,
        compensate=arguments.compensate,
        data=arguments.data,
        sequences=arguments.sequences,
        length=arguments.length,
        loftq=lora_of(arguments.loftq) if arguments.loftq else None,
    )
    with met() as (device, speaks):
        record = quantize(asked, device)
    if speaks:
        errors = [error for layer in record["layers"].values() for error in layer.values()]
        made = record["asked"]
        print(
            f"{arguments.output}: {made['format']}, {made['bits']} bits a code, {record['bits_per_weight']:.3f} bits a "
            f"weight, {len(errors)} matrices in {len(record['layers'])} layers; compensation {made['compensate']}, relative "
            f"error {record['error']} {min(errors):.2%} to {max(errors):.2%}, mean {sum(errors) / len(errors):.2%}"
        )
        start = f", and starts there with the 'lora' section of {arguments.loftq}" if arguments.loftq else ""
        print(f'a run loads it with "quantization": {{"format": "{made["format"]}"}}{start}')
    return 0
