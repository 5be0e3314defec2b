"""How much faster is a SparseLoRA step of a mixture of experts than plain PEFT LoRA's, in one process?

    python benchmarks/moe_step.py [--adapters experts] [--dtype bfloat16] [--json]

A Qwen3-MoE with random weights, the same model and adapters on both sides. Correctness comes first: in every gradient the
sparse step must equal a step of the family's own experts, run twice, in which context tokens take those with the dropped
neurons at zero. Then the sides take turns, and the medians are compared, by the clock and by the processor's time, which
other people's work on the machine changes little. ``ideal`` is the ratio of the FLOPs that PyTorch's own counter sees,
``--implementation`` that of the family's experts, by default the faster of two.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import sparselora_kernels.flop_counts  # noqa: F401  (registers the formulas)
from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.tokens import partition_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMPLEMENTATIONS = ("eager", "grouped_mm")


def build(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        moe_intermediate_size=arguments.width,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.active,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        head_dim=64,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).to(DTYPES[arguments.dtype])
    parameters = PARAMETERS if arguments.adapters == "experts" else None
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, target_parameters=parameters, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens; all but the first ``context`` of every row are dense: their own or the next label is trained."""
    ids = torch.randint(0, arguments.vocabulary, (arguments.rows, arguments.length))
    labels = ids.clone()
    labels[:, : min(round(arguments.context * arguments.length) + 1, arguments.length - 1)] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()


class Narrow:
    """In the place of the ``forward`` of the family's experts: its own, with and without the dropped neurons."""

    def __init__(self, experts: Any, kept: Tensor, context: Tensor) -> None:
        self.module, self.family, self.context = experts.module, type(experts.module), context
        mask = torch.zeros(experts.count * experts.width, dtype=self.module.down_proj.dtype)
        mask[kept] = 1
        self.mask = mask.view(experts.count, 1, -1)

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        whole = {"gate_up_proj": self.module.gate_up_proj, "down_proj": self.module.down_proj}
        outputs = []
        for values in (whole, {**whole, "down_proj": whole["down_proj"] * self.mask}):
            stand_in = self.family.__new__(self.family)
            stand_in.__dict__ = {**self.module.__dict__, "_parameters": {}, **values}
            outputs.append(self.family.forward(stand_in, x, *args))
        rows = torch.zeros(x.shape[0], 1, dtype=torch.bool).index_fill_(0, self.context, True)
        return torch.where(rows, outputs[1], outputs[0])


def check(dense: nn.Module, sparse: nn.Module, batch: dict[str, Tensor], tolerance: float) -> float:
    """The largest difference, relative to the largest value, between the sparse step and the masked dense step."""
    step(sparse, batch)
    context = partition_tokens(batch["labels"]).context
    modules = []
    for layer in decoder_layers(dense):
        if (kept := selection(sparse).get(layer.index, {}).get("experts")) is not None:
            assert layer.experts is not None
            modules.append(layer.experts.module)
            modules[-1].forward = Narrow(layer.experts, kept, context)
    step(dense, batch)
    for module in modules:
        del module.forward
    trained = dict(sparse.named_parameters())
    pairs = [(p.grad, trained[name].grad) for name, p in dense.named_parameters() if p.requires_grad]
    worst = max(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)
    dense.zero_grad(), sparse.zero_grad()
    if not worst <= tolerance:
        raise SystemExit(
            f"sparse step differs from the masked dense step by {worst:.2g} (allowed {tolerance:g}): no timing"
        )
    return worst


def flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--adapters", choices=("attention", "experts"), default="attention", help="experts: there too")
    parser.add_argument("--implementation", choices=("fastest", *IMPLEMENTATIONS), default="fastest")
    parser.add_argument("--context", type=float, default=0.75, help="share of tokens without label")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the experts, on all layers but the first")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=704, help="of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
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
    layers = {"experts": {f"1-{arguments.layers - 1}": arguments.sparsity}}
    apply_sparselora(sparse, SparseLoRAConfig.from_dict({"layers": layers}))
    if arguments.credit_baseline:
        apply_sparselora(dense, SparseLoRAConfig.from_dict({"enabled": False}))
    batch = make_batch(arguments)
    dense.config._experts_implementation = "eager"
    error = check(dense, sparse, batch, TOLERANCE[DTYPES[arguments.dtype]])
    ideal = flops(dense, batch) / flops(sparse, batch)

    sides = {name: (dense, name) for name in IMPLEMENTATIONS if arguments.implementation in ("fastest", name)}
    sides["sparse"] = (sparse, None)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in sides} for clock in clocks}
    optimizers = {
        id(model): torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for model in (dense, sparse)
    }
    for repeat in range(arguments.repeats + 1):
        for name, (model, implementation) in sides.items():
            dense.config._experts_implementation = implementation or "eager"
            start = {clock: read() for clock, read in clocks.items()}
            step(model, batch)
            optimizers[id(model)].step()
            optimizers[id(model)].zero_grad(set_to_none=True)
            for clock, read in clocks.items():
                if repeat:  # The first turn warms up.
                    times[clock][name].append(read() - start[clock])

    medians = {
        clock: {name: round(statistics.median(values), 3) for name, values in sides_.items()}
        for clock, sides_ in times.items()
    }
    # Against the faster of the family's own.
    speedups = {
        clock: min(value for name, value in found.items() if name != "sparse") / found["sparse"]
        for clock, found in medians.items()
    }
    split = partition_tokens(batch["labels"])
    result = {
        "speedup": round(speedups["wall"], 3),
        "cpu_speedup": round(speedups["cpu"], 3),
        "ideal": round(ideal, 3),
        "seconds": medians["wall"],
        "cpu_seconds": medians["cpu"],
        "error": error,
        "dtype": arguments.dtype,
        "adapters": arguments.adapters,
        "context_share": round(split.context.numel() / split.tokens, 4),
        "experts_sparsity": arguments.sparsity,
        "experts": [arguments.experts, arguments.active, arguments.width],
        "shape": [arguments.layers, arguments.hidden, arguments.rows, arguments.length],
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
