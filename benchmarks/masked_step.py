"""What does a step cost that keeps a pruned base's zeros, against plain LoRA's on the same base, in one process?

    python benchmarks/masked_step.py [--dtype bfloat16] [--pattern 2:4] [--json]

A Llama with random pruned weights and adapters on all linear layers. Correctness comes first: loss and every gradient must
equal those of the formula written down, ``linear(x, (W + s·B·A) ⊙ (W ≠ 0))``, which takes its turn as ``naive``. Then the
sides take turns, and medians are compared with PEFT's plain LoRA, which fills the zeros when it is merged. Memory is the
highest sum of what a step holds at once by PyTorch's allocator, in matrices of the largest size (the FFN's); autograd's the
sum of what waits for backward.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora_dist import SparseBaseConfig, SparseLoRAConfig, apply_sparselora
from sparselora_dist.pruning.pattern import Pattern, smallest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = SparseLoRAConfig(enabled=False, skip_unused_logits=False)


class Naive(nn.Module):
    """A masked LoRA layer as it is written down."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling["default"]
        self.register_buffer("weight", layer.base_layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * (self.lora_B["default"].weight @ self.lora_A["default"].weight)
        return nn.functional.linear(x, (self.weight + update) * (self.weight != 0))


def build(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 256),
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(DTYPES[arguments.dtype])
    pattern = Pattern.parse(arguments.pattern) if ":" in arguments.pattern else Pattern.share(float(arguments.pattern))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers." in name:
            parameter.data[smallest(parameter.detach().abs(), pattern, "row")] = 0
    lora = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def sides_of(model: Any) -> dict[str, Any]:
    naive = copy.deepcopy(model)
    for name, module in list(naive.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, own = name.rpartition(".")
            setattr(naive.get_submodule(parent), own, Naive(module))
    sides = {"peft": copy.deepcopy(model), "naive": naive, "plain": apply_sparselora(copy.deepcopy(model), PLAIN)}
    for gradient in ("straight_through", "exact"):
        sparse_base = SparseBaseConfig(gradient=gradient)
        sides[gradient] = apply_sparselora(copy.deepcopy(model), PLAIN, sparse_base=sparse_base)
    return sides


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def check(sides: dict[str, Any], batch: dict[str, Tensor], tolerance: float) -> float:
    """The largest difference of a gradient, relative to its largest value, between the formula's and ours."""
    losses = {name: step(sides[name], batch) for name in ("naive", "exact", "straight_through")}
    expected, got = (dict(sides[name].named_parameters()) for name in ("naive", "exact"))
    pairs = [(p.grad, got[name].grad) for name, p in expected.items() if p.requires_grad]
    worst = max(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)
    for model in sides.values():
        model.zero_grad(set_to_none=True)
    same = torch.equal(losses["exact"], losses["straight_through"]) and torch.allclose(
        losses["exact"], losses["naive"], rtol=tolerance
    )
    if not (worst <= tolerance and same):
        raise SystemExit(f"masked step differs from the formula by {worst:.2g} (allowed {tolerance:g}): no timing")
    return worst


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that ``call`` holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def saved(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    del loss
    return sum(size for place, size in kept.items() if place not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--pattern", default="2:4", help="N:M, or a share such as 0.5")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    sides = sides_of(build(arguments))
    ids = torch.randint(0, arguments.vocabulary, (arguments.rows, arguments.length))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    error = check(sides, batch, TOLERANCE[DTYPES[arguments.dtype]])
    matrix = arguments.hidden * arguments.width * DTYPES[arguments.dtype].itemsize
    memory = {}
    for name, model in sides.items():
        memory[name] = {"peak": peak(lambda model=model: step(model, batch)), "saved": saved(model, batch)}
        model.zero_grad(set_to_none=True)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in sides} for clock in clocks}
    for repeat in range(arguments.repeats + 1):
        for name, model in sides.items():
            start = {clock: read() for clock, read in clocks.items()}
            step(model, batch)
            model.zero_grad(set_to_none=True)
            for clock, read in clocks.items():
                if repeat:  # The first turn warms up.
                    times[clock][name].append(read() - start[clock])
    medians = {clock: {name: statistics.median(v) for name, v in found.items()} for clock, found in times.items()}
    rows = {
        name: {
            "time": round(medians["wall"][name] / medians["wall"]["peft"], 3),
            "cpu_time": round(medians["cpu"][name] / medians["cpu"]["peft"], 3),
            "peak_matrices": round((memory[name]["peak"] - memory["plain"]["peak"]) / matrix, 2),
            "saved": round(memory[name]["saved"] / memory["plain"]["saved"], 3),
        }
        for name in sides
    }
    result = {"error": error, "tokens": ids.numel(), "seconds": round(medians["wall"]["peft"], 3), "sides": rows}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{ids.numel()} tokens, {arguments.pattern}, {arguments.dtype}, largest error of a gradient {error:.1e}")
    print(f"plain PEFT LoRA: {result['seconds']} s a step\n")
    print(
        "| step | time / PEFT | processor time / PEFT | peak above ours plain, matrices | kept by autograd / ours plain |"
    )
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['time']:.2f} | {row['cpu_time']:.2f} | {row['peak_matrices']:+.2f} | {row['saved']:.2f} |"
        )


if __name__ == "__main__":
    main()
