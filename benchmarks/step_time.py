"""How much faster is a SparseLoRA step than plain PEFT LoRA's, in one process?

    python benchmarks/step_time.py --dtype float32 --context 0.75 [--json]

Both sides are the same model with the same adapters. Correctness comes first: the sparse step must equal a dense step
in which the dropped neurons are set to zero, in every gradient. Then the two take turns, and the medians are
compared. ``ideal`` is the ratio of their FLOPs, ``efficiency`` the share of it that is reached.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.train.metrics import flop_model

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from shapes import hf_config, llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def build(arguments: argparse.Namespace) -> Any:
    """A Llama with GQA and random weights; LoRA r=16 on q, k, v, o."""
    torch.manual_seed(0)
    shape = llama(
        hidden=arguments.hidden,
        width=arguments.width,
        layers=arguments.layers,
        heads=arguments.hidden // 128,
        kv_heads=max(1, arguments.hidden // 512),
        vocabulary=arguments.vocabulary,
    )
    config = hf_config(shape, max_position_embeddings=arguments.length, use_cache=False)
    model = LlamaForCausalLM(config).to(DTYPES[arguments.dtype])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens; all but the first ``context`` of every row are dense: their own or the next label is trained."""
    ids = torch.randint(0, arguments.vocabulary, (arguments.rows, arguments.length))
    labels = ids.clone()
    # At least one label per row is left, or there would be no loss.
    labels[:, : min(round(arguments.context * arguments.length) + 1, arguments.length - 1)] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def check(dense: nn.Module, sparse: nn.Module, batch: dict[str, Tensor], tolerance: float) -> float:
    """The largest difference, relative to the largest value, between the sparse step and the masked dense step."""
    step(sparse, batch)
    context = partition_tokens(batch["labels"]).context
    handles = []
    for layer in decoder_layers(dense):
        kept = selection(sparse).get(layer.index, {}).get("ffn")
        if kept is not None:
            handles.append(layer.module.mlp.down_proj.register_forward_pre_hook(_mask(kept, context)))  # type: ignore[union-attr]
    step(dense, batch)
    for handle in handles:
        handle.remove()
    pairs = [
        (p.grad, dict(sparse.named_parameters())[name].grad) for name, p in dense.named_parameters() if p.requires_grad
    ]
    worst = max(
        float("inf") if not torch.isfinite(b).all() else ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()
        for a, b in pairs
    )
    dense.zero_grad(), sparse.zero_grad()
    if not worst <= tolerance:
        raise SystemExit(
            f"sparse step differs from the masked dense step by {worst:.2g} (allowed {tolerance:g}): no timing"
        )
    return worst


def _mask(kept: Tensor, context: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        keep = torch.ones(args[0].shape[0] * args[0].shape[1], args[0].shape[2], dtype=args[0].dtype)
        keep[context] = 0
        keep[context[:, None], kept] = 1
        return (args[0] * keep.view_as(args[0]),)

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--context", type=float, default=0.75, help="share of tokens without label")
    parser.add_argument("--sparsity", type=float, default=0.99, help="of the FFN, on all layers but the first")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49152, help="SmolLM2-360M's: the nearest published shape")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--credit-baseline", action="store_true", help="LM head at label positions on the dense side too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    dense = build(arguments)
    sparse = copy.deepcopy(dense)
    layers = {"ffn": {f"1-{arguments.layers - 1}": arguments.sparsity}}
    apply_sparselora(sparse, SparseLoRAConfig.from_dict({"layers": layers}))
    if arguments.credit_baseline:
        apply_sparselora(dense, SparseLoRAConfig.from_dict({"enabled": False}))
    batch = make_batch(arguments)
    error = check(dense, sparse, batch, TOLERANCE[DTYPES[arguments.dtype]])

    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in (("dense", dense), ("sparse", sparse))
    }
    for repeat in range(arguments.repeats + 1):
        for name, model in (("dense", dense), ("sparse", sparse)):
            start = time.perf_counter()
            step(model, batch)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if repeat:  # The first turn warms up.
                times[name].append(time.perf_counter() - start)

    split = partition_tokens(batch["labels"])
    state = find_state(sparse)
    assert state is not None
    flops = flop_model(sparse, state)
    labels = int((batch["labels"] != -100).sum())
    whole = flops.executed(split.tokens, 0, arguments.length, labels if arguments.credit_baseline else None)
    ideal = whole / flops.executed(split.dense.numel(), split.context.numel(), arguments.length, labels)
    medians = {name: statistics.median(values) for name, values in times.items()}
    speedup = medians["dense"] / medians["sparse"]
    result = {
        "speedup": round(speedup, 3),
        "ideal": round(ideal, 3),
        "efficiency": round(speedup / ideal, 3),
        "dense_seconds": round(medians["dense"], 3),
        "sparse_seconds": round(medians["sparse"], 3),
        "error": error,
        "dtype": arguments.dtype,
        "context_share": round(split.context.numel() / split.tokens, 4),
        "ffn_sparsity": arguments.sparsity,
        "shape": [arguments.layers, arguments.hidden, arguments.width, arguments.rows, arguments.length],
        "vocabulary": arguments.vocabulary,
        "baseline_credited": arguments.credit_baseline,
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print("   ".join(f"{name} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
