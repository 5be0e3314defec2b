"""Do rewards and margins move under SparseLoRA as they do under dense LoRA? TRL's DPO and GRPO on real prompts.

    python benchmarks/objectives.py --model models/base-9m --rows math/train.jsonl

DPO prefers a problem's own answer over another problem's; GRPO rewards the share of digits in a short completion, with two
passes over each generation and a KL penalty. Dense and sparse runs of the same seeds see the same data. For each: what the
first step says (DPO's loss must be ln 2 and its margin 0; GRPO's KL and clipped share 0), and the mean of the last steps
by seed. A few minutes on one CPU core that is not shared.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar as disable_loading_bar
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.train.metrics import flop_model

LAYERS = {"ffn": {"1-6": 0.9}, "qk": {"2-5": 0.5}, "vo": {"2-5": 0.5}}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WATCHED = {
    "dpo": ("loss", "rewards/margins", "rewards/accuracies"),
    "grpo": ("kl", "clip_ratio/region_mean", "reward"),
}
LAST = 4
"""Logged values at the end whose mean is shown."""
CHECKED = 3


def model_of(path: str, scale: float | None, seed: int) -> Any:
    """``scale`` of the sparsity in :data:`LAYERS`; ``None``: plain PEFT."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"))
    if scale is not None:
        layers = {group: {at: scale * share for at, share in ranges.items()} for group, ranges in LAYERS.items()}
        apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": layers}))
    return model


def digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def run(
    objective: str, scale: float | None, seed: int, options: argparse.Namespace, steps: int
) -> tuple[list[dict[str, float]], Any]:
    """The logged rows of a run, and its model."""
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines()[:400]]
    rows = [row for row in rows if len(row["instruction"]) < 260]
    model = model_of(options.model, scale, seed)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": seed,
    }
    common: dict[str, Any] = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
        "callbacks": [] if scale is None else [SparseLoRACallback()],
    }
    trainer: Any
    if objective == "dpo":
        pairs = [
            {"prompt": row["instruction"] + "\n", "chosen": row["output"][:120], "rejected": other["output"][:120]}
            for row, other in pairwise(rows)
        ]
        settings |= {"per_device_train_batch_size": 4, "max_length": 192}
        trainer = DPOTrainer(args=DPOConfig(**settings), train_dataset=Dataset.from_list(pairs), **common)
    else:
        prompts = [{"prompt": row["instruction"] + "\n"} for row in rows]
        settings |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12}
        settings |= {"num_iterations": 2, "beta": 0.04}
        trainer = GRPOTrainer(
            args=GRPOConfig(**settings), reward_funcs=digits, train_dataset=Dataset.from_list(prompts), **common
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], model


def shares(model: Any) -> tuple[float, float]:
    """Of a sparse run: tokens that were computed sparsely, and its FLOPs over those of plain PEFT."""
    state = find_state(model)
    assert state is not None
    counts, flops, length = state.context.counts, flop_model(model, state), 128
    total = counts.dense + counts.context
    executed = flops.executed(counts.dense, counts.context, length, logits=counts.dense)
    return counts.context / total, executed / flops.dense(total, length)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def check(objective: str, options: argparse.Namespace) -> None:
    """At sparsity 0 a run is that of plain PEFT."""
    sides = [run(objective, scale, 0, options, CHECKED)[0] for scale in (None, 0.0)]
    apart = max(abs(float(one["loss"]) - float(other["loss"])) for one, other in zip(*sides, strict=True))
    print(
        f"{objective}: at sparsity 0 the losses of {CHECKED} steps are within {apart:.1e} of plain PEFT's", flush=True
    )
    assert apart < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSONL with instruction and output")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", choices=sorted(WATCHED), default=list(WATCHED))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    disable_loading_bar()
    torch.set_num_threads(1)
    for objective in options.objectives:
        check(objective, options)
    if not options.seeds:
        return
    print("| objective | run | first step | mean of the last steps | context tokens | FLOPs |")
    print("|---|---|---|---|---|---|")
    for objective in options.objectives:
        for sparse in (False, True):
            first: dict[str, list[float]] = {name: [] for name in WATCHED[objective]}
            last: dict[str, list[float]] = {name: [] for name in WATCHED[objective]}
            told = ("", "")
            for seed in range(options.seeds):
                history, model = run(objective, 1.0 if sparse else None, seed, options, options.steps)
                for name in WATCHED[objective]:
                    values = [float(row[name]) for row in history if name in row]
                    first[name].append(values[0])
                    last[name].append(statistics.mean(values[-LAST:]))
                if sparse:
                    told = tuple(f"{100 * share:.1f} %" for share in shares(model))  # type: ignore[assignment]
            begin = ", ".join(f"{name} {max(values, key=abs):.7g}" for name, values in first.items())
            end = ", ".join(f"{name} {spread(values)}" for name, values in last.items())
            cells = objective, "sparse" if sparse else "dense", begin, end, *told
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
