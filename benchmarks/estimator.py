"""Are estimator factors better when the truncation knows the inputs? Same rank, same cost in training.

    python benchmarks/estimator.py DIR [--ranks 8 32] [--seeds 3]

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_dist.data import collate
from sparselora_dist.engines.base import make_engine
from sparselora_dist.families import decoder_layers
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.layers.ffn import SparseFFN
from sparselora_dist.method.channels import SCORED
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.train.run import build_model
from sparselora_kernels import kept_count, select_channels

sys.path.append(str(Path(__file__).resolve().parent))
from quality import Harness
from quality_variants import ExactAttention, ExactFFN

SPARSITY = {"ffn": 0.9, "qk": 0.5, "vo": 0.5}
KINDS = ("svd", "diagonal", "full")
_CALIBRATION_ROWS = 64
_ROWS_PER_BATCH = 8

Moments = dict[tuple[int, str], Tensor]
"""(layer, "mlp" or "attention") -> E[x xᵀ] (H, H), fp64."""


def weighted_factors(weight: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``(A, B)`` of rank ``rank`` that minimise E‖(W − B·A)x‖².

    With ``W M^½ = U Σ Vᵀ`` the minimum is the projection ``U_r U_rᵀ W``: ``B = U_r``, ``A = U_rᵀ W``. ``M`` need not be
    invertible, and only the eigenvectors of ``W M Wᵀ`` are needed.

    Args:
        weight: (out, in).
        moment: (in, in) second moment E[x xᵀ] of the inputs; its diagonal alone also does.
    """
    w = weight.double()
    u = torch.linalg.eigh(w @ moment @ w.t()).eigenvectors[:, -rank:]
    return (u.t() @ w).to(weight.dtype).contiguous(), u.to(weight.dtype).contiguous()


def moment_of(kind: str, moment: Tensor) -> Tensor:
    """The weighting of a kind; for ``svd`` none."""
    if kind == "svd":
        return torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return torch.diag(moment.diagonal()) if kind == "diagonal" else moment


def install(model: nn.Module, kind: str, rank: int, moments: Moments) -> None:
    """Give every estimator of ``model`` factors of this kind and rank."""
    weights = ModelWeights(model)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for part, estimator in (("mlp", layer.mlp), ("attention", layer.attention)):
                estimator = getattr(estimator, "estimator" if part == "mlp" else "sparse_estimator", None)
                for name in sum(SCORED.values(), ()) if estimator is not None else ():
                    short = name.removesuffix("_proj")
                    if hasattr(estimator, f"{short}_a"):
                        moment = moment_of(kind, moments[layer.index, part])
                        a, b = weighted_factors(weights.get(layer.index, name), rank, moment)
                        getattr(estimator, f"{short}_a").data, getattr(estimator, f"{short}_b").data = a, b


def watch(model: nn.Module, see: Callable[[int, str, Tensor], None]) -> list[Any]:
    """Call ``see(layer, part, x (B, S, H))`` with the input of every FFN and attention."""
    handles = []
    for layer in decoder_layers(model):
        for part, module in (("mlp", layer.mlp), ("attention", layer.attention.q_proj)):
            hook = partial(_seen, see, layer.index, part)
            handles.append(module.register_forward_pre_hook(hook))  # type: ignore[union-attr]
    return handles


def _seen(see: Callable[[int, str, Tensor], None], layer: int, part: str, _: nn.Module, args: tuple[Tensor]) -> None:
    see(layer, part, args[0])


def context_inputs(harness: Harness, model: nn.Module, data: Any, see: Callable[[int, str, Tensor], None]) -> None:
    """Run the model, dense, on the first rows of ``data`` and show ``see`` what its context tokens bring, (T, H)."""
    model.eval()
    for start in range(0, min(_CALIBRATION_ROWS, len(data)), _ROWS_PER_BATCH):
        rows = list(range(start, min(start + _ROWS_PER_BATCH, len(data))))
        batch = collate(data, rows, harness.pad)
        context = partition_tokens(batch.pop("labels"), batch["attention_mask"]).context
        handles = watch(model, lambda layer, part, x: see(layer, part, x.flatten(0, 1)[context]))  # noqa: B023
        with torch.no_grad():
            model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()


def second_moments(harness: Harness, model: nn.Module) -> Moments:
    moments: Moments = {}
    tokens = 0

    def add(layer: int, part: str, x: Tensor) -> None:
        nonlocal tokens
        tokens += x.shape[0] if (layer, part) == (0, "mlp") else 0
        moments[layer, part] = moments.get((layer, part), 0) + x.double().t() @ x.double()

    context_inputs(harness, model, harness.train, add)
    return {key: total / tokens for key, total in moments.items()}


def agreement(harness: Harness, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Group -> mean over layers and batches of (recall, score)."""
    exact: dict[tuple[int, str], Any] = {}
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in SPARSITY}
    layers = decoder_layers(model)
    for layer in layers:
        exact[layer.index, "mlp"] = ExactFFN(layer.mlp)
        exact[layer.index, "attention"] = ExactAttention(layer.attention)

    def compare(layer: int, part: str, x: Tensor) -> None:
        rows, module = torch.arange(x.shape[0]), layers[layer]
        estimator: Any = module.mlp.estimator if part == "mlp" else module.attention.sparse_estimator
        pair = [score(x, rows) for score in (exact[layer, part], estimator)]
        scores = [{"ffn": s} if part == "mlp" else estimator.scores(s) for s in pair]
        for group, truth in scores[0].items():
            keep = kept_count(truth.numel(), SPARSITY[group])
            best, ours = (select_channels(s[group], keep) for s in scores)
            recall = torch.isin(best, ours).float().mean().item()
            found[group].append((recall, (truth[ours].sum() / truth[best].sum()).item()))

    context_inputs(harness, model, harness.eval, compare)
    return {group: tuple(statistics.mean(column) for column in zip(*pairs)) for group, pairs in found.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seeds", type=int, default=0, help="fine-tuned runs of each; 0 for recall alone")
    options = parser.parse_args()
    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    harness = Harness(argparse.Namespace(**settings, output=str(options.folder)))
    harness.choose_sparsity()
    depth = len(harness.budget.model.layers)
    config = harness.config({group: dict.fromkeys(range(depth), s) for group, s in SPARSITY.items()})
    engine = make_engine(config)
    model, _ = build_model(config, engine)
    assert any(isinstance(module, SparseFFN) for module in model.modules())
    moments = second_moments(harness, model)
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
