"""``sparselora-dist merge``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..config.quantization import Format

from ..process import importing

DESCRIPTION = """\
Merge a LoRA adapter into its base model, shard by shard: at most one shard of the result is in memory. Everything is
checked before anything is written, and the output folder appears whole or not at all.

Merge into the weights that training saw. An adapter trained on a base in few bits learned to correct what these make of
it: give that run's quantization as --format and --bits. --load-in-4bit is --format nf4, with --no-double-quant where that
run switched bnb_4bit_use_double_quant off. An adapter that LoftQ started says itself how its base was stored. A base that
bitsandbytes has quantised (nf4) is recognised and dequantised without any option; give --load-in-4bit here too when the
adapter was trained by this library, which stores o_proj and down_proj by column and therefore quantises these two again.

An adapter that was trained under the zeros of a pruned model (sparse_base) says so in its adapter_config.json: the merged
model is zero wherever that base is. --save-in-4bit writes the merged model in NF4, for Transformers with bitsandbytes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``merge``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the base model, in safetensors")
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="the adapter, as PEFT saves it")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to be made; must not exist")
    parser.add_argument(
        "--format", choices=get_args(Format), help="quantization.format that the adapter was trained with"
    )
    parser.add_argument("--bits", type=int, help="of --format, where the run said quantization.bits")
    parser.add_argument("--load-in-4bit", action="store_true", help="the adapter was trained on 4-bit weights (NF4)")
    parser.add_argument("--save-in-4bit", action="store_true", help="write the linears' weights in NF4 (bitsandbytes)")
    parser.add_argument(
        "--no-double-quant",
        action="store_true",
        help="with --load-in-4bit: scales were not quantised in training; with --save-in-4bit: nor are they in the output",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        default="bfloat16",
        help="of the output; with --format or --load-in-4bit also what training computed in (default: bfloat16)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge and say what was written; 0."""
    with importing():
        from ..io.merge import merge_adapter

    nf4 = arguments.load_in_4bit or arguments.format == "nf4" or arguments.save_in_4bit
    if arguments.no_double_quant and not nf4:
        raise ValueError(
            "--no-double-quant says how 4-bit weights are stored: give --load-in-4bit too, or --save-in-4bit, or leave it "
            "out"
        )
    summary = merge_adapter(
        arguments.base,
        arguments.adapter,
        arguments.output,
        dtype=arguments.dtype,
        load_in_4bit=arguments.load_in_4bit,
        format=arguments.format,
        bits=arguments.bits,
        save_in_4bit=arguments.save_in_4bit,
        double_quant=not arguments.no_double_quant,
    )
    print(summary)
    return 0
