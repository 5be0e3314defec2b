"""What a command says at the end of a run."""

from __future__ import annotations

import os
import shlex
from typing import Any

from ..config.run import RunConfig
from ..io.weights import checkpoint_folder


def closing_words(config: RunConfig, summary: dict[str, Any]) -> str:
    """What the run reached, where the adapter is, and what comes next."""
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
    stored = config.quantization
    if stored.stored == "nf4":
        merge += ["--load-in-4bit", *([] if stored.bnb_4bit_use_double_quant else ["--no-double-quant"])]
    elif stored.stored:
        merge += ["--format", stored.stored, *(["--bits", str(stored.bits)] if stored.bits else [])]
    return f"""
{losses}
{summary["executed_flops_share"]:.1%} of plain LoRA's FLOPs{speed}
adapter: {summary["adapter"]} (PEFT's format, with tokenizer and model card)
next:    {shlex.join(["sparselora-dist", "inspect", folder])}
         {shlex.join(merge)}"""
