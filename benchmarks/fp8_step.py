"""What does a step cost whose frozen weights are fp8: multiplied as they are, decoded, or bf16; dense LoRA and SparseLoRA?

    python benchmarks/fp8_step.py [--shape 8b] [--layers 8] [--tokens 8192] [--json]

Models of a published shape with random weights, all sides with the same frozen values (those of fp8) and adapters, bf16
computation, the published sparsity. Correctness comes first: loss and gradients of the decoded side against bf16's, and of
the multiplied side against the decoded, where rounding the tokens to fp8 too is all that differs. Sides take turns; medians
are compared with dense LoRA on bf16. ``fp8`` needs a GPU of compute capability 8.9 and is left out elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))

from gpu_models import CODECS, SETTINGS, build, credit, make_sparse, plain_copy
from gpu_sides import Side, make_batch
from gpu_timing import no_collection, timed
from shapes import SHAPES
from torch import Tensor

from sparselora_dist.codecs.linear import FrozenLinear
from sparselora_kernels.backend import use_fp8

DTYPE = torch.bfloat16
DECODED, MULTIPLIED = 0.1, 0.3
"""How far gradients may be from those they are compared with, of their norm: two ways to sum in bf16; fp8 tokens, whose
rounding by 3 % adds up over products and layers."""


def sides_of(arguments: argparse.Namespace, device: torch.device) -> dict[str, Side]:
    shape = SHAPES[arguments.shape]
    options: dict[str, Any] = {"device": device, "dtype": DTYPE, "length": arguments.length}
    first = build(shape, arguments.layers, "fp8 decoded", **options)
    models = {"bf16": plain_copy(first, shape, **options), "fp8 decoded": credit(copy.deepcopy(first))}
    if use_fp8(torch.empty(0, device=device)):
        models["fp8"] = credit(multiplied(copy.deepcopy(first)))
    sparse = make_sparse(copy.deepcopy(first), shape, SETTINGS["math"], DTYPE)
    models["fp8 decoded, sparse"] = sparse
    if "fp8" in models:
        models["fp8, sparse"] = multiplied(copy.deepcopy(sparse))
    return {name: Side(model, device, DTYPE) for name, model in models.items()}


def multiplied(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.codec = CODECS["fp8"]
    return model


def gradients(side: Side, batch: dict[str, Tensor]) -> Tensor:
    """Of all adapters, one after another, fp32."""
    side.gradients(batch)
    found = torch.cat([p.grad.float().flatten() for p in side.model.parameters() if p.requires_grad])
    side.optimizer.zero_grad(set_to_none=True)
    return found


def check(sides: dict[str, Side], batch: dict[str, Tensor]) -> dict[str, float]:
    """By side: how far its gradients are from those of the side that has the same formula and rounds less."""
    pairs = {"fp8 decoded": ("bf16", DECODED), "fp8": ("fp8 decoded", MULTIPLIED)}
    pairs |= {"fp8, sparse": ("fp8 decoded, sparse", MULTIPLIED)}
    found = {}
    for name, (other, allowed) in pairs.items():
        if name in sides:
            got, want = gradients(sides[name], batch), gradients(sides[other], batch)
            found[name] = float((got - want).norm() / want.norm())
            if not found[name] <= allowed:
                raise SystemExit(
                    f"{name}: gradients are {found[name]:.2g} from {other}'s (allowed {allowed}): no timing"
                )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--context", type=float, default=0.75, help="share of tokens without labels (default 0.75)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    sides = sides_of(arguments, device)
    vocabulary = sides["bf16"].model.get_base_model().config.vocab_size
    batch = make_batch(vocabulary, arguments.tokens, arguments.length, arguments.context, device)
    errors = check(sides, batch)
    times: dict[str, list[float]] = {name: [] for name in sides}
    with no_collection():
        for repeat in range(arguments.repeats + 1):
            for name, side in sides.items():
                seconds = timed(lambda side=side: side.step(batch), device)
                if repeat:  # The first turn warms up.
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = {
        name: {
            "ms": round(1e3 * medians[name], 2),
            "time": round(medians[name] / medians["bf16"], 3),
            "held_gb": round(side.held / 1e9, 4),
            "gradients": errors.get(name),
        }
        for name, side in sides.items()
    }
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if arguments.json:
        print(json.dumps({"device": what, "tokens": arguments.tokens, "sides": rows}))
        return
    print(f"{what}, {arguments.layers} layers of {arguments.shape}, {arguments.tokens} tokens\n")
    print("| step | ms | time / bf16 | model and optimizer, GB | gradients from those that round less |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        far = "" if row["gradients"] is None else f"{row['gradients']:.1e}"
        print(f"| {name} | {row['ms']} | {row['time']:.2f} | {row['held_gb']} | {far} |")


if __name__ == "__main__":
    main()
