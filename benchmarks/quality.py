"""Does SparseLoRA train as good a model as LoRA? Fine-tunes one base in several ways and compares them on held-out rows.

    python benchmarks/quality.py run --preset tiny --model M --train T.jsonl --eval E.jsonl --output DIR --seeds 3
    python benchmarks/quality.py table DIR

``run`` appends a row to DIR/rows.jsonl for every finished (variant, seed) and skips the finished ones, so that it can be
stopped and continued. Variants of one seed share the adapter's start and the order of the data. FLOPs are those of the
real tokens, executed, against plain LoRA with its LM head at every position; the dense runs here leave out the unused
logits as the sparse ones do, so that what is compared is channel sparsity alone.

Without --calibrated the sparsity of every layer and group is chosen by :func:`calibrate`, once, and kept in
DIR/sparse_lora.json. ``local`` masks are those of --local-ranks ranks: the batch is run as so many micro-batches, each of
which chooses for its own rows, and the gradients are added up as ranks add them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, set_seed
from transformers.utils.logging import disable_progress_bar

from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.config.run import RunConfig
from sparselora_dist.config.sparse import SparseLoRAConfig
from sparselora_dist.data import GlobalBatchSampler, collate, load_dataset_tokens, padding_id
from sparselora_dist.engines import make_engine
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.train.evaluate import evaluate
from sparselora_dist.train.feed import Feed
from sparselora_dist.train.loop import TrainingLoop
from sparselora_dist.train.metrics import flop_model

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from quality_variants import (
    GROUPS,
    VARIANTS,
    Budget,
    Layers,
    Variant,
    calibrate,
    scaled,
    use_no_split,
    use_oracle,
    use_random,
)

PRESETS: dict[str, dict[str, Any]] = {
    # A base of some million parameters on one CPU core.
    "tiny": {"steps": 50, "max_length": 160, "eval_limit": 120, "answers": 24, "dtype": "float32"},
    # Bases by their Hugging Face names, on one GPU. Any other name: --model.
    "smollm2-360m": {"model": "HuggingFaceTB/SmolLM2-360M", "steps": 300, "batch": 16, "max_length": 512},
    "llama3-8b": {"model": "meta-llama/Meta-Llama-3-8B", "steps": 500, "batch": 16, "learning_rate": 3e-4},
}


# --- runs ------------------------------------------------------------------------------------------------------------


class Harness:
    """The base, the data and the sparsity that all variants share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(self.config().model)
        self.train, self.eval = (
            load_dataset_tokens(path, self.tokenizer, options.max_length, split, limit)
            for path, split, limit in (
                (options.train, "train", options.train_limit),
                (options.eval, "validation", options.eval_limit),
            )
        )
        self.pad = padding_id(self.tokenizer)
        self.layers: Layers = {}
        self.budget: Budget

    def config(self, layers: Layers | None = None, seed: int = 0, steps: int = 1, **changes: Any) -> RunConfig:
        options = self.options
        parts = changes.pop("parts", 1)
        sparse = {"layers": {g: {str(k): s for k, s in m.items()} for g, m in layers.items()}} if layers else {}
        return RunConfig.from_dict(
            {
                "model": {"name_or_path": options.model, "dtype": options.dtype},
                "lora": {"r": options.lora_rank, "lora_alpha": 2 * options.lora_rank},
                "sparse_lora": {"enabled": bool(layers), "rank": options.rank, **sparse, **changes},
                "data": {"train": options.train, "eval": options.eval, "max_length": options.max_length},
                "train": {
                    "output_dir": str(Path(options.output) / "log"),
                    "max_steps": max(steps, 1),
                    "learning_rate": options.learning_rate,
                    "warmup_ratio": 0.05,
                    "per_device_train_batch_size": options.batch // parts,
                    "per_device_eval_batch_size": max(options.batch, 16),
                    "gradient_accumulation_steps": parts,
                    "seed": seed,
                    "disable_tqdm": True,
                },
            }
        )

    def choose_sparsity(self) -> None:
        """From --calibrated, from an earlier call of this benchmark, or calibrated now."""
        options = self.options
        file = Path(options.calibrated or Path(options.output) / "sparse_lora.json")
        set_seed(0)
        depth = AutoConfig.from_pretrained(options.model, trust_remote_code=False).num_hidden_layers
        config = self.config({group: dict.fromkeys(range(depth), 0.5) for group in GROUPS})
        engine = make_engine(config)
        model, _ = build_model(config, engine.placement())
        engine.prepare(model)
        state = find_state(model)
        assert state is not None
        self.budget = Budget.of(flop_model(model, state), self.train)
        if not file.is_file():
            rows = GlobalBatchSampler(self.train.lengths, options.batch, 1, 1, 0)
            batches = [collate(self.train, rows.batch(n).indices.tolist(), self.pad) for n in range(2)]
            moved = [{name: t.to(engine.device) for name, t in batch.items()} for batch in batches]
            chosen = calibrate(model, moved, self.budget, options.flops, VARIANTS["global"].start)
            layers = {group: {str(k): s for k, s in by_layer.items()} for group, by_layer in chosen.items()}
            saved = SparseLoRAConfig(layers=layers, rank=options.rank, start_step=VARIANTS["global"].start)
            file.write_text(json.dumps(saved.to_dict(), indent=1), encoding="utf-8")
        engine.close()
        resolved = SparseLoRAConfig.from_file(file).sparsity(depth)
        self.layers = {group: by_layer for group, by_layer in resolved.items() if by_layer}

    def plan(self, variant: Variant) -> tuple[Layers, int]:
        """The sparsity and the number of steps of a variant."""
        steps, target = self.options.steps, self.budget.share(self.layers, variant.start)
        layers = {} if variant.dense else self.layers
        if variant.uniform:
            everywhere = {group: dict.fromkeys(range(len(self.budget.model.layers)), 0.5) for group in variant.uniform}
            layers = scaled(everywhere, target, self.budget, variant.start, split=True)
        if not variant.split and variant.same_flops:
            layers = scaled(layers, target, self.budget, variant.start, split=False)
        if variant.budget is not None:
            dense = self.budget.share({})
            steps = round(steps * variant.budget * dense / (dense if variant.dense else target))
        return layers, steps

    def run(self, name: str, seed: int, change: Callable[[nn.Module], None] | None = None) -> dict[str, Any]:
        """Train and evaluate; the row of the table. ``change`` is done to the model before it trains."""
        variant, started = VARIANTS[name], time.perf_counter()
        layers, steps = self.plan(variant)
        parts = self.options.local_ranks if variant.local else 1
        config = self.config(layers, seed, steps, start_step=variant.start, parts=parts)
        engine = make_engine(config)
        engine.total_steps = steps
        set_seed(seed)
        model, _ = build_model(config, engine.placement())
        state = find_state(model)
        assert state is not None
        if variant.channels != "estimator":
            {"oracle": use_oracle, "random": use_random}[variant.channels](model)
        if not variant.split:
            use_no_split(state.context)
        if change:
            change(model)
        flops = flop_model(model, state)
        engine.prepare(model)
        totals = {"flops": 0.0, "plain_flops": 0.0}
        if steps:
            loop = TrainingLoop(
                config=config,
                engine=engine,
                context=state.context,
                train_data=self.train,
                eval_data=None,
                sampler=GlobalBatchSampler(
                    self.train.lengths, self.options.batch // parts, 1, parts, seed, config.train.group_by_length
                ),
                pad_token_id=self.pad,
                total_steps=steps,
                flops=flops,
            )
            loop.run()
            totals = {"flops": loop.totals.flops_executed, "plain_flops": loop.totals.flops_dense}
        feed = Feed(config, engine, self.eval, self.pad, flops.quadratic)
        result = evaluate(engine, state.context, feed, max(self.options.batch, 16))
        right = self.answers(engine.model)
        engine.close()
        return {
            "variant": name,
            "seed": seed,
            "steps": steps,
            "loss": result.loss,
            "token_accuracy": result.token_accuracy,
            "answers": right,
            **totals,
            "seconds": round(time.perf_counter() - started, 1),
        }

    @torch.no_grad()
    def answers(self, model: Any) -> float | None:
        """Share of the first --answers held-out rows whose greedily generated answer ends in the right word or number."""
        rows = [self.eval[row] for row in range(min(self.options.answers, len(self.eval)))]
        # Where the answer starts; a row that max_length left without one has nothing to compare with.
        split = [(ids, int(mask.argmax())) for ids, mask in rows if mask.any()]
        if not split:
            return None
        width = max(start for _, start in split)
        longest = max(ids.size - start for ids, start in split)
        ids = torch.full((len(split), width), self.pad)
        mask = torch.zeros_like(ids)
        for line, (row, start) in enumerate(split):
            ids[line, width - start :] = torch.from_numpy(row[:start].astype("int64"))
            mask[line, width - start :] = 1
        model.eval()
        device = next(model.parameters()).device
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=self.pad,
        )[:, width:]
        text = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        wanted = self.tokenizer.batch_decode([row[start:] for row, start in split], skip_special_tokens=True)
        return sum(final_word(a) == final_word(b) for a, b in zip(text, wanted)) / len(split)


def final_word(text: str) -> str | float:
    """The last word, as a number where it is one: an instruction answer states its result at the end."""
    words = text.split()
    word = words[-1].strip(".,:;!?$%").replace(",", "").lower() if words else ""
    try:
        return float(word)
    except ValueError:
        return word


def read_rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def run(options: argparse.Namespace) -> None:
    """Every (seed, variant) that DIR lacks."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    same = {k: v for k, v in vars(options).items() if k not in ("command", "output", "seeds", "variants", "preset")}
    settings = folder / "settings.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")) != same:
        raise SystemExit(f"{settings} holds other settings: use another --output, or repeat the command as it was")
    settings.write_text(json.dumps(same, indent=1), encoding="utf-8")
    disable_progress_bar()
    done = {(row["variant"], row["seed"]) for row in read_rows(folder)}
    missing = [(name, seed) for seed, name in itertools.product(range(options.seeds), options.variants)]
    missing = [(name, seed) for name, seed in missing if (name, seed) not in done and (name != "base" or seed == 0)]
    if not missing:
        return
    harness = Harness(options)
    harness.choose_sparsity()
    for name, seed in missing:
        row = harness.run(name, seed)
        with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name} seed {seed}: loss {row['loss']:.4f}, {row['seconds']} s", flush=True)


# --- table -----------------------------------------------------------------------------------------------------------


def table(folder: Path) -> Iterator[str]:
    """Markdown lines."""
    rows = read_rows(folder)
    by = {(row["variant"], row["seed"]): row for row in rows}
    yield "| variant | what | seeds | steps | FLOPs | held-out loss | against dense | answers right |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, variant in VARIANTS.items():
        mine = [row for row in rows if row["variant"] == name]
        if mine and (variant.budget is None or name == "base"):
            shares = [row["flops"] / row["plain_flops"] for row in mine if row["plain_flops"]]
            yield _line(name, variant.what, mine, f"{statistics.mean(shares):.1%}" if shares else "", by, "dense")
    if not any(VARIANTS[row["variant"]].budget for row in rows):
        return
    yield ""
    yield "| budget | what | seeds | steps | TFLOP | held-out loss | against dense at the same FLOPs | answers right |"
    yield "|---|---|---|---|---|---|---|---|"
    for percent in (25, 50, 100):
        for kind in ("dense", "global"):
            reference = "dense" if percent == 100 else f"dense_{percent}"
            name = reference if kind == "dense" else f"global_{percent}"
            mine = [row for row in rows if row["variant"] == name]
            if mine:
                flops = f"{statistics.mean(row['flops'] for row in mine) / 1e12:.2f}"
                yield _line(f"{percent} %", VARIANTS[name].what, mine, flops, by, reference)


def _line(head: str, what: str, rows: list[dict], flops: str, by: dict[tuple[str, int], dict], reference: str) -> str:
    pairs = [row["loss"] / by[reference, row["seed"]]["loss"] - 1 for row in rows if (reference, row["seed"]) in by]
    same = rows[0]["variant"] == reference or not pairs
    right = [row["answers"] for row in rows if row["answers"] is not None]
    cells = [
        head,
        what,
        str(len(rows)),
        str(rows[0]["steps"]),
        flops,
        spread([row["loss"] for row in rows], "{:.4f}"),
        "" if same else spread([100 * p for p in pairs], "{:+.2f}") + " %",
        spread([100 * r for r in right], "{:.1f}") + " %" if right else "",
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation over seeds."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else mean


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="fine-tune and evaluate what DIR lacks")
    command.add_argument("--preset", choices=PRESETS, help="defaults of the options below")
    command.add_argument("--model", help="folder or Hugging Face name")
    command.add_argument("--train", required=True)
    command.add_argument("--eval", required=True)
    command.add_argument("--output", required=True, metavar="DIR")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    command.add_argument("--calibrated", help="a sparse_lora.json; by default calibrated here")
    command.add_argument("--flops", type=float, default=0.6, help="what is calibrated for, of plain LoRA's FLOPs")
    command.add_argument("--rank", type=int, default=8, help="of the estimator")
    command.add_argument("--lora-rank", type=int, default=16)
    command.add_argument("--steps", type=int, default=120, help="of the dense run")
    command.add_argument("--batch", type=int, default=8, help="sequences per step")
    command.add_argument("--local-ranks", type=int, default=2, help="ranks that the local variant stands for")
    command.add_argument("--learning-rate", type=float, default=1e-3)
    command.add_argument("--max-length", type=int, default=1024)
    command.add_argument("--train-limit", type=int)
    command.add_argument("--eval-limit", type=int)
    command.add_argument("--answers", type=int, default=48, help="held-out rows to generate answers for")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    show = commands.add_parser("table", help="print the table of DIR")
    show.add_argument("output", metavar="DIR")
    if "--preset" in arguments and (given := arguments[arguments.index("--preset") + 1]) in PRESETS:
        command.set_defaults(**PRESETS[given])
    options = parser.parse_args(arguments)
    if options.command == "run" and options.model is None:
        parser.error("--model is required, or a --preset that names one")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.command == "run":
        run(options)
    else:
        print("\n".join(table(Path(options.output))))


if __name__ == "__main__":
    main(sys.argv[1:])
