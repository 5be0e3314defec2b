"""What packing to a token budget is worth on rows as people have them, dense and sparse, in one process.

    python benchmarks/packing.py --rows math/train.jsonl --tokenizer models/base-9m [--json]

The same rows of every optimizer step, padded in micro-batches of ``--per-device`` rows with an attention mask (what a
trainer does) and packed into as few lines of at most ``--budget`` tokens as that takes. Correctness comes first: one
micro-batch, packed and padded, must give the same loss, gradients and masks. Then the four sides take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.data import (
    GlobalBatchSampler,
    TokenDataset,
    collate,
    collate_packed,
    load_dataset_tokens,
    pack,
)
from sparselora_dist.layers.packed_attention import IMPLEMENTATION, PackedRows, use_packed_attention
from sparselora_dist.method.tokens import partition_tokens

sys.path.append(str(Path(__file__).resolve().parent))
import step_time

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
DEMO = Path(__file__).resolve().parents[1] / "demo"


def padded(data: TokenDataset, rows: list[int]) -> dict[str, Any]:
    """As a trainer hands them over: with an attention mask."""
    return collate(data, rows, pad_token_id=0)


def packed(data: TokenDataset, rows: list[int]) -> dict[str, Any]:
    """One line, and where its rows end."""
    line = collate_packed(data, rows, pad_token_id=0)
    where = PackedRows.of(line["lengths"], torch.device("cpu")).arguments(IMPLEMENTATION)
    return {name: line[name] for name in ("input_ids", "labels", "position_ids")} | where


def run_step(model: nn.Module, parts: list[dict[str, Any]], labels: int) -> float:
    """Forward and backward of the micro-batches of a step; the loss."""
    total = 0.0
    for part in parts:
        loss = model(**part, num_items_in_batch=labels, use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total


def check(model: nn.Module, data: TokenDataset, rows: list[int], tolerance: float) -> float:
    """The largest difference of a gradient between the two forms of one micro-batch, relative to its largest value."""
    found = []
    labels = int(data.label_counts[rows].sum())
    for form in (padded, packed):
        loss = run_step(model, [form(data, rows)], labels)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss, gradients, selection(model)))
        model.zero_grad()
    (loss, gradients, masks), (again, others, chosen) = found
    worst = max(((gradients[n] - others[n]).abs().max() / gradients[n].abs().max()).item() for n in gradients)
    same = all(torch.equal(c, chosen[layer][g]) for layer, groups in masks.items() for g, c in groups.items())
    if not (worst <= tolerance and abs(loss - again) <= tolerance * abs(loss) and same):
        raise SystemExit(
            f"packed and padded differ: gradients by {worst:.2g}, losses {loss} and {again}, masks equal: {same}"
        )
    return worst


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides, median seconds a step."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    data = load_dataset_tokens(options.rows, tokenizer, options.max_length, limit=options.limit)
    model_options = argparse.Namespace(**vars(options), length=options.max_length)
    dense = step_time.build(model_options)
    use_packed_attention(dense.get_base_model())
    sparse = copy.deepcopy(dense)
    apply_sparselora(
        sparse, SparseLoRAConfig.from_dict({"layers": {"ffn": {f"1-{options.layers - 1}": options.sparsity}}})
    )
    apply_sparselora(dense, SparseLoRAConfig.from_dict({"enabled": False}))
    sampler = GlobalBatchSampler(
        data.lengths, options.per_device, 1, options.accumulation, seed=0, group_by_length=not options.mixed
    )
    steps = [sampler.batch(number) for number in range(options.steps + 1)]
    error = check(sparse, data, steps[0].micro_batch(0, 0), TOLERANCE[options.dtype])

    forms: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
        "padded": lambda batch: [padded(data, batch.micro_batch(m, 0)) for m in range(batch.accumulation)],
        "packed": lambda batch: [
            packed(data, list(part[0])) for part in pack(batch.indices, data.lengths, options.budget, 1).parts
        ],
    }
    seconds: dict[str, list[float]] = {}
    cells, real, context, micro_batches = {"padded": 0, "packed": 0}, 0, 0, {"padded": 0, "packed": 0}
    for number, batch in enumerate(steps):
        labels = int(data.label_counts[batch.indices].sum())
        for form, make in forms.items():
            parts = make(batch)
            if number:
                cells[form] += sum(part["input_ids"].numel() for part in parts)
                micro_batches[form] += len(parts)
            if number and form == "packed":
                real += int(data.lengths[batch.indices].sum())
                context += sum(partition_tokens(part["labels"]).context.numel() for part in parts)
            for name, model in (("dense", dense), ("sparse", sparse)):
                start = time.perf_counter()
                run_step(model, parts, labels)
                model.zero_grad(set_to_none=True)
                if number:  # The first step warms up.
                    seconds.setdefault(f"{form} {name}", []).append(time.perf_counter() - start)
    tokens = real / options.steps
    median = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "rows": len(data),
        "median_row": int(np.median(data.lengths)),
        "context_share": round(context / real, 3),
        "padding_share": {form: round(1 - real / cells[form], 3) for form in forms},
        "micro_batches_a_step": {form: micro_batches[form] / options.steps for form in forms},
        "tokens_per_second": {side: round(tokens / value, 1) for side, value in median.items()},
        "sparse_over_dense": {form: round(median[f"{form} dense"] / median[f"{form} sparse"], 3) for form in forms},
        "packed_over_padded": {
            name: round(median[f"padded {name}"] / median[f"packed {name}"], 3) for name in ("dense", "sparse")
        },
        "error": error,
        "dtype": options.dtype,
        "budget": options.budget,
        "rows_a_step": options.per_device * options.accumulation,
        "per_device": options.per_device,
        "grouped_by_length": not options.mixed,
        "shape": [options.layers, options.hidden, options.width],
        "threads": options.threads,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=str(DEMO / "data" / "train.jsonl"), help="instruction data")
    parser.add_argument("--tokenizer", default=str(DEMO / "model"))
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a packed micro-batch")
    parser.add_argument("--per-device", type=int, default=4, help="rows of a padded micro-batch")
    parser.add_argument("--accumulation", type=int, default=6, help="padded micro-batches of a step")
    parser.add_argument("--mixed", action="store_true", help="rows of any length in a batch, as trainers do by default")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--sparsity", type=float, default=0.99)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
