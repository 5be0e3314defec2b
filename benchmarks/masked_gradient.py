"""How near is the straight-through gradient of a masked adapter to the exact one? On a real model, from both starts.

    python benchmarks/masked_gradient.py --model M --data DATA --output DIR

DIR is that of pruned_quality.py: pruned bases are taken from there, or made. The gradient D of every whole matrix is
autograd's; from it, with A (r, in), B (out, r), scaling s and the mask M:

    exact              dB = s·(D ⊙ M)·Aᵀ     dA = s·Bᵀ·(D ⊙ M)
    straight-through   dB = s·D·Aᵀ           dA = s·Bᵀ·D

Where B is 0, dA is 0 in both, and the cosine is that of dB alone. First, those of the library are checked against them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from sparselora_dist.apply.build import build_model
from sparselora_dist.data import GlobalBatchSampler, collate
from sparselora_dist.engines import make_engine

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from pruned_quality import Harness, matrices, parser_of_run

Factors = dict[str, tuple[Tensor, Tensor]]
"""Matrix -> A (r, in) and B (out, r), fp32."""


class Masked:
    """A pruned model whose matrices are Ŵ of factors that stand beside it."""

    def __init__(self, folder: str, rank: int, scaling: float) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.model: Any = model.requires_grad_(False).eval()
        self.names = list(matrices(self.model))
        self.parameters = {name: self.model.get_submodule(name).weight for name in self.names}
        self.base = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.mask = {name: weight != 0 for name, weight in self.base.items()}
        self.rank, self.scaling = rank, scaling

    def whole(self, factors: Factors, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """D: the gradient of the mean loss by every whole Ŵ."""
        for name, weight in self.parameters.items():
            a, b = factors[name]
            weight.requires_grad_(False).copy_((self.base[name] + self.scaling * b @ a) * self.mask[name])
            weight.grad = None
            weight.requires_grad_(True)
        for batch in batches:
            (self.model(**batch, use_cache=False).loss / len(batches)).backward()
        return {name: weight.grad for name, weight in self.parameters.items() if weight.grad is not None}

    def kaiming(self) -> Factors:
        """As PEFT starts."""
        factors = {}
        for name in self.names:
            out, inner = self.base[name].shape
            a = torch.empty(self.rank, inner)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            factors[name] = a, torch.zeros(out, self.rank)
        return factors

    def from_gradient(self, batches: list[dict[str, Tensor]]) -> Factors:
        """As LoRS starts: A are the first right singular vectors of the whole gradient."""
        zero = {name: (a * 0, b) for name, (a, b) in self.kaiming().items()}
        found = {}
        for name, gradient in self.whole(zero, batches).items():
            found[name] = torch.linalg.svd(gradient, full_matrices=False).Vh[: self.rank].contiguous(), zero[name][1]
        return found

    def exact(self, whole: dict[str, Tensor], factors: Factors) -> Factors:
        return self.straight({name: value * self.mask[name] for name, value in whole.items()}, factors)

    def straight(self, whole: dict[str, Tensor], factors: Factors) -> Factors:
        s = self.scaling
        return {name: (s * b.t() @ whole[name], s * whole[name] @ a.t()) for name, (a, b) in factors.items()}

    def train(self, factors: Factors, batches: list[dict[str, Tensor]], rate: float) -> Factors:
        """A step of AdamW by the exact gradient on each batch."""
        leaves = [part.clone().requires_grad_() for pair in factors.values() for part in pair]
        optimizer = torch.optim.AdamW(leaves, rate, weight_decay=0.0)
        now = factors
        for place, batch in enumerate(batches):
            now = {name: (leaves[2 * i].detach(), leaves[2 * i + 1].detach()) for i, name in enumerate(factors)}
            grads = self.exact(self.whole(now, [batch]), now)
            for leaf, grad in zip(leaves, (part for name in factors for part in grads[name])):
                leaf.grad = grad
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (place + 1) / 3)
            optimizer.step()
        return now


def cosines(one: Factors, other: Factors) -> tuple[list[float], float]:
    """Of every matrix, dA and dB together; and of all in one vector."""
    pairs = [(torch.cat([p.flatten() for p in one[n]]), torch.cat([p.flatten() for p in other[n]])) for n in one]
    each = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
    return each, torch.cosine_similarity(*(torch.cat(side) for side in zip(*pairs)), dim=0).item()


def check_library(harness: Harness, base: str, masked: Masked, factors: Factors, batch: dict[str, Tensor]) -> None:
    """Ends the script where the library's gradients, in either mode, are not those of the formulas."""
    whole = masked.whole(factors, [batch])
    for mode, right in (("exact", masked.exact(whole, factors)), ("straight_through", masked.straight(whole, factors))):
        config = harness.config(base, "general", sparse_base={"enabled": True, "gradient": mode})
        engine = make_engine(config)
        model, _ = build_model(config, engine.placement())
        engine.prepare(model)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in factors}
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                name, _, side = path.removeprefix("base_model.model.").partition(".lora_")
                parameter.data.copy_(factors[name][side[0] == "B"])
                found[name][side[0]] = parameter
        engine.model(**batch, use_cache=False).loss.backward()
        for name, (a, b) in right.items():
            for side, wanted in (("A", a), ("B", b)):
                got = found[name][side].grad
                assert got is not None
                if (apart := ((got - wanted).norm() / wanted.norm()).item()) > 1e-3:
                    raise SystemExit(f"{base}: d{side} of {name}, {mode}, is {apart:.1e} away from the formula")
        engine.close()


def lines(options: argparse.Namespace) -> Iterator[str]:
    """The table."""
    Path(options.output).mkdir(parents=True, exist_ok=True)
    harness = Harness(options)
    (train, held_out), pad = harness.texts["general"], harness.pad
    sampler = GlobalBatchSampler(train.lengths, options.batch, 1, 1, 0, True)
    batches = [collate(train, sampler.batch(n).indices.tolist(), pad) for n in range(options.steps)]
    rows = collate(held_out, list(range(min(16, len(held_out)))), pad)
    yield "| base | start | steps before | cosine, all matrices | median matrix | least | greatest |"
    yield "|---|---|---|---|---|---|---|"
    for name in options.bases:
        base = harness.base(name)
        masked = Masked(base, options.lora_rank, 2.0)
        set_seed(0)
        for start in ("Kaiming", "gradient"):
            factors = masked.kaiming() if start == "Kaiming" else masked.from_gradient(batches[: 128 // options.batch])
            for steps in (0, options.steps):
                factors = masked.train(factors, batches[:steps], options.learning_rate) if steps else factors
                if steps and start == "Kaiming":
                    check_library(harness, base, masked, factors, rows)
                whole = masked.whole(factors, [rows])
                each, together = cosines(masked.straight(whole, factors), masked.exact(whole, factors))
                each.sort()
                figures = together, each[len(each) // 2], each[0], each[-1]
                yield f"| {name} | {start} | {steps} | {' | '.join(f'{value:.3f}' for value in figures)} |"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser_of_run(parser)
    parser.add_argument("--bases", nargs="+", default=["wanda 0.5", "wanda 2:4", "sparsegpt 2:4"], metavar="NAME")
    disable_progress_bar()
    for line in lines(parser.parse_args(arguments)):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
