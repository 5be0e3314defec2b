"""``torch.compile`` of a sparse model: graphs, breaks, recompilations, equal losses, and time against eager.

    python benchmarks/compile.py [--backend aot_eager] [--layers 6] [--hidden 256] [--times 0]

Every side runs batches of one shape whose completions begin elsewhere; its losses are compared with those of the same
model uncompiled. ``--times N`` also times N steps (forward and backward) of either, after two that are not counted.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora_dist import SparseLoRAConfig, apply_sparselora

SIDES = ("plain PEFT", "enabled: false", "sparse")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = 4


def make(side: str, options: argparse.Namespace, checkpointing: bool) -> Any:
    """The same model for every side, with an adapter that is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=11 * options.hidden // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: Any = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    )
    if side != SIDES[0]:
        last = options.layers - 1
        groups = {"ffn": {f"0-{last}": 0.9}, "qk": {f"1-{last}": 0.5}, "vo": {f"1-{last}": 0.5}}
        apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": groups, "enabled": side == SIDES[2]}))
    if checkpointing:
        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.disable_input_require_grads()  # Its hook breaks the graph of every model.
    return model.train()


def batch(number: int, rows: int = 4, length: int = 256) -> dict[str, Tensor]:
    """Three quarters context, more or less from batch to batch."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 1000, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : length * 3 // 4 - 3 * number - row] = -100
    return {"input_ids": ids, "labels": labels}


def steps(model: nn.Module, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        loss: Tensor = model(**batch(number)).loss
        loss.backward()
        losses.append(loss.item())
    return losses


def seconds(run: Callable[[range], Any], times: int) -> float:
    """The median of ``times`` steps."""
    taken = []
    for number in range(times):
        start = time.perf_counter()
        run(range(number % BATCHES, number % BATCHES + 1))
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


def row(side: str, options: argparse.Namespace, checkpointing: bool) -> str:
    torch._dynamo.reset()
    counters.clear()
    eager, model = (make(side, options, checkpointing) for _ in range(2))
    compiled: Any = torch.compile(model, backend=options.backend)
    expected = steps(eager, range(BATCHES))
    losses = steps(compiled, range(1))
    first = counters["stats"]["unique_graphs"]
    losses += steps(compiled, range(1, BATCHES))
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    apart = max(abs(a - b) for a, b in zip(losses, expected))
    words = [side, "yes" if checkpointing else "no", str(first), str(breaks), f"{breaks / options.layers:.1f}"]
    words += [str(graphs - first), f"{apart:.1e}"]
    if options.times:
        for one in (eager, compiled):
            steps(one, range(2))
        ours, theirs = (seconds(lambda r, one=one: steps(one, r), options.times) for one in (eager, compiled))
        words += [f"{ours * 1e3:.0f} ms", f"{theirs * 1e3:.0f} ms", f"{ours / theirs:.2f}x"]
    return f"| {' | '.join(words)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--no-checkpointing", action="store_true", help="leave out the rows with it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    heads = ["model", "checkpointing", "graphs", "breaks", "a layer", "compiled again", "loss apart by at most"]
    heads += ["eager step", "compiled step", "faster"] if options.times else []
    print(f"backend {options.backend}, torch {torch.__version__}, {options.layers} layers, hidden {options.hidden}")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for checkpointing in (False,) if options.no_checkpointing else (False, True):
        for side in options.sides:
            print(row(side, options, checkpointing), flush=True)


if __name__ == "__main__":
    main()
