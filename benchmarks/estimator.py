"""Are estimator factors better when the truncation knows the inputs? Same rank, same cost in training.

    python benchmarks/estimator.py DIR [--ranks 8 32] [--seeds 3] [--moments OTHER_DIR]

``DIR`` is a folder of ``quality.py run``: its model, data, steps and sparsity are used. Three factorisations of every
frozen matrix W at rank r, W ≈ B·A:

    svd         minimises ‖W − B·A‖, blind to the data
    diagonal    minimises ‖(W − B·A)·D‖, D² the diagonal of M
    full        minimises ‖(W − B·A)·M^½‖ = E‖(W − B·A)x‖², M = E[x xᵀ] over context tokens of 64 training rows

For each: the share of the channels that exact activations keep which the estimate keeps too (recall), the share of the
exact score that it keeps of the most that could be kept (score), both on held-out rows at the sparsities below; and, with
--seeds, the held-out loss of the fine-tuned model, one JSON row per run in DIR/estimator.jsonl, finished ones skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_dist.apply.build import build_model
from sparselora_dist.data import collate
from sparselora_dist.engines import make_engine
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layers.ffn import SparseFFN
from sparselora_dist.layouts import decoder_layers
from sparselora_dist.method.channels import SCORED
from sparselora_dist.method.estimator import low_rank_factors
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.train.moments import Moments, second_moments
from sparselora_kernels import kept_count, select_channels

sys.path.append(str(Path(__file__).resolve().parent))
from quality import Harness
from quality_variants import ExactAttention, ExactFFN

SPARSITY = {"ffn": 0.9, "qk": 0.5, "vo": 0.5}
KINDS = ("svd", "diagonal", "full")
_ROWS = 64
_ROWS_PER_BATCH = 8


def moment_of(kind: str, moment: Tensor) -> Tensor | None:
    """The weighting of a kind."""
    return {"svd": None, "diagonal": torch.diag(moment.diagonal()), "full": moment}[kind]


def install(model: nn.Module, kind: str, rank: int, moments: Moments) -> None:
    """Give every estimator of ``model`` factors of this kind and rank."""
    weights = ModelWeights(model)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for part, estimator in (("mlp", layer.module.mlp), ("attention", layer.module.self_attn)):
                estimator = getattr(estimator, "estimator" if part == "mlp" else "sparse_estimator", None)
                for name in sum(SCORED.values(), ()) if estimator is not None else ():
                    short = name.removesuffix("_proj")
                    if hasattr(estimator, f"{short}_a"):
                        moment = moment_of(kind, moments[layer.index, name])
                        a, b = low_rank_factors(weights.get(layer.index, name), rank, second_moment=moment)
                        getattr(estimator, f"{short}_a").data, getattr(estimator, f"{short}_b").data = a, b


def batches(harness: Harness, data: Any) -> Iterator[dict[str, Tensor]]:
    """The first rows of a data set."""
    for start in range(0, min(_ROWS, len(data)), _ROWS_PER_BATCH):
        yield collate(data, list(range(start, min(start + _ROWS_PER_BATCH, len(data)))), harness.pad)


def agreement(harness: Harness, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Group -> mean over layers and batches of (recall, score)."""
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in SPARSITY}
    rows = torch.empty(0, dtype=torch.int64)

    def compare(estimator: Any, exact: Any, _: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].flatten(0, 1)
        pair = [score(x, rows) for score in (exact, estimator)]
        ffn = isinstance(exact, ExactFFN)
        truth, ours = ({"ffn": sums} if ffn else estimator.scores(sums) for sums in pair)
        for group, scores in truth.items():
            keep = kept_count(scores.numel(), SPARSITY[group])
            best, chosen = select_channels(scores, keep), select_channels(ours[group], keep)
            recall = torch.isin(best, chosen).float().mean().item()
            found[group].append((recall, (scores[chosen].sum() / scores[best].sum()).item()))

    handles = []
    for layer in decoder_layers(model):
        mlp, attention = layer.module.mlp, layer.module.self_attn
        see = partial(compare, mlp.estimator, ExactFFN(mlp))
        handles.append(mlp.register_forward_pre_hook(see))
        see = partial(compare, attention.sparse_estimator, ExactAttention(attention))
        handles.append(attention.q_proj.register_forward_pre_hook(see))
    model.eval()
    for batch in batches(harness, harness.eval):
        rows = partition_tokens(batch.pop("labels"), batch["attention_mask"]).context
        with torch.no_grad():
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {group: tuple(statistics.mean(column) for column in zip(*pairs)) for group, pairs in found.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seeds", type=int, default=0, help="fine-tuned runs of each; 0 for recall alone")
    parser.add_argument("--moments", type=Path, metavar="DIR", help="take the inputs from another folder's data")
    options = parser.parse_args()
    harness = harness_of(options.folder)
    harness.choose_sparsity()
    seen = harness_of(options.moments).train if options.moments else harness.train
    depth = len(harness.budget.model.layers)
    config = harness.config({group: dict.fromkeys(range(depth), s) for group, s in SPARSITY.items()})
    engine = make_engine(config)
    model, _ = build_model(config, engine.placement())
    assert any(isinstance(module, SparseFFN) for module in model.modules())
    moments = second_moments(model, batches(harness, seen))
    print("| rank | factors | " + " | ".join(f"{group} recall | {group} score" for group in SPARSITY) + " |")
    print("|---|---|" + "---|---|" * len(SPARSITY))
    for rank in options.ranks:
        for kind in KINDS:
            install(model, kind, rank, moments)
            cells = [f"{r:.3f} | {s:.3f}" for r, s in agreement(harness, model).values()]
            print(f"| {rank} | {kind} | {' | '.join(cells)} |", flush=True)
    engine.close()
    del model
    tune(harness, options, moments)


def harness_of(folder: Path) -> Harness:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return Harness(argparse.Namespace(**settings, output=str(folder)))


def tune(harness: Harness, options: argparse.Namespace, moments: Moments) -> None:
    """Fine-tune with each kind; held-out losses."""
    file = options.folder / "estimator.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    done = {(row["rank"], row["factors"], row["seed"]) for row in rows}
    harness.options.answers = 0
    for seed in range(options.seeds):
        for rank in options.ranks:
            for kind in KINDS:
                if (rank, kind, seed) not in done:
                    row = harness.run("global", seed, partial(install, kind=kind, rank=rank, moments=moments))
                    rows.append({"rank": rank, "factors": kind, "seed": seed, "loss": row["loss"]})
                    with open(file, "a", encoding="utf-8") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
    for rank in options.ranks:
        for kind in KINDS:
            losses = [row["loss"] for row in rows if (row["rank"], row["factors"]) == (rank, kind)]
            if losses:
                spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
                print(f"rank {rank}, {kind}: held-out loss {statistics.mean(losses):.4f}{spread}, {len(losses)} seeds")


if __name__ == "__main__":
    main()
