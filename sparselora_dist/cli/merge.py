"""``sparselora-dist merge``."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Merge a LoRA adapter into its base model, shard by shard: at most one shard of the result is in memory. Everything is
checked before anything is written, and the output folder appears whole or not at all.

Merge into the weights that training saw. An adapter trained with quantization.load_in_4bit learned to correct the 4-bit
weights: give --load-in-4bit, and --no-double-quant where that run switched bnb_4bit_use_double_quant off. A base that
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
        help="of the output; with --load-in-4bit also what training computed in (default: bfloat16)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge and say what was written; 0."""
    from ..io.merge import merge_adapter

    if arguments.no_double_quant and not (arguments.load_in_4bit or arguments.save_in_4bit):
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
        save_in_4bit=arguments.save_in_4bit,
        double_quant=not arguments.no_double_quant,
    )
    print(summary)
    return 0
