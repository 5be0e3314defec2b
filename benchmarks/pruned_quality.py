"""What does tuning bring back of what pruning took? Prunes one model in several ways, tunes each with and without the mask.

    python benchmarks/pruned_quality.py run --model M --data DATA --output DIR --seeds 3
    python benchmarks/pruned_quality.py table DIR

DATA holds ``math/`` (train.jsonl, eval.jsonl) and ``commonsense/``. ``run`` appends a row to DIR/rows.jsonl for every
finished arm and seed and skips the finished ones, so that it can be stopped and continued; pruned bases stay in
DIR/bases. Arms of one seed share the adapter's start and the order of the rows.

Checked before a row is written, and an error otherwise: a base has the zeros that were asked for; a merged masked
model has every zero of its base; of seed 0 also, it starts with its base's loss, and merged has the adapter's.
Plain LoRA is merged too: how many zeros it fills in, and its loss when they are put back afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.config.run import RunConfig
from sparselora_dist.data import GlobalBatchSampler, TokenDataset, collate, load_dataset_tokens, padding_id
from sparselora_dist.engines import make_engine
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.pruning.pattern import Pattern
from sparselora_dist.pruning.prune import Pruning, prune
from sparselora_dist.train.gradient_start import start_at_gradient
from sparselora_dist.train.loop import TrainingLoop
from sparselora_dist.train.metrics import flop_model

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from pruned_arms import BASES, GROUPS, ROUNDS, WAYS, Arm, arms, write_general_text
from pruned_table import table
from quality import read_rows

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAME = 1e-4
"""Nats between two ways of computing one model."""


# --- runs ------------------------------------------------------------------------------------------------------------


class Harness:
    """The pruned bases and the texts that all arms share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.output)
        data, rows = Path(options.data), options.batch * options.steps
        self.paths = {
            "general": write_general_text(data, self.folder, 4 * rows, options.eval_rows),
            "math": (data / "math" / "train.jsonl", data / "math" / "eval.jsonl"),
        }
        tokenizer = load_tokenizer(self.config(options.model, "general").model)
        self.pad = padding_id(tokenizer)
        self.texts: dict[str, tuple[TokenDataset, TokenDataset]] = {}
        for task, (train, held_out) in self.paths.items():
            self.texts[task] = (
                load_dataset_tokens(str(train), tokenizer, options.max_length, "train", rows),
                load_dataset_tokens(str(held_out), tokenizer, options.max_length, "validation", options.eval_rows),
            )
        self.untuned: dict[tuple[str, str], float] = {}

    def config(self, base: str, task: str, seed: int = 0, **sections: Any) -> RunConfig:
        options, rank = self.options, sections.pop("lora_rank", self.options.lora_rank)
        return RunConfig.from_dict(
            {
                "model": {"name_or_path": base, "dtype": "float32"},
                "lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEARS},
                "sparse_lora": {"enabled": False},
                "data": {"train": str(self.paths[task][0]), "max_length": options.max_length},
                "train": {
                    "output_dir": str(self.folder / "log"),
                    "max_steps": options.steps,
                    "learning_rate": options.learning_rate,
                    "warmup_ratio": 0.05,
                    "per_device_train_batch_size": options.batch,
                    "seed": seed,
                    "disable_tqdm": True,
                },
                **sections,
            }
        )

    def base(self, name: str) -> str:
        """The folder of a base; pruned now if it is not there."""
        if name == "dense":
            return self.options.model
        method, pattern = BASES.get(name) or name.split()
        output = self.folder / "bases" / f"{method}-{pattern.replace(':', 'of')}"
        wanted = Pattern.parse(pattern) if ":" in pattern else Pattern.share(float(pattern))
        if not output.is_dir():
            prune(
                Pruning(
                    model=self.options.model,
                    method=method,
                    pattern=wanted,
                    output=output,
                    data=None if method == "magnitude" else str(self.paths["general"][0]),
                    sequences=self.options.sequences,
                    length=self.options.max_length,
                )
            )
        weights = matrices(AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False))
        for key, weight in weights.items():
            zero = weight == 0
            right = zero.view(-1, wanted.of).sum(1).eq(wanted.zeros(wanted.of)).all() if wanted.of else True
            # Whole weights of a row.
            if not right or abs(zero.double().mean().item() - wanted.sparsity) > 1 / weight.shape[1]:
                raise SystemExit(f"{output}: {key} does not have the zeros of {pattern}")
        return str(output)

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train and evaluate; a row of the table."""
        started, base = time.perf_counter(), self.base(arm.base)
        _, held_out = self.texts[arm.task]
        row: dict[str, Any] = {"task": arm.task, "base": arm.base, "way": arm.way, "seed": seed}
        if arm.way == "untuned":
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
            row |= {"loss": mean_loss(model, held_out, self.pad)}
        elif arm.way in ROUNDS:
            row |= self.tune_in_rounds(arm, seed)
        else:
            row |= self.tune(arm, base, seed)
        return {**row, "seconds": round(time.perf_counter() - started, 1)}

    def tune(self, arm: Arm, base: str, seed: int) -> dict[str, Any]:
        train, held_out = self.texts[arm.task]
        config = self.config(base, arm.task, seed, **WAYS[arm.way])
        engine = make_engine(config)
        engine.total_steps = steps = self.options.steps
        set_seed(seed)
        model, _ = build_model(config, engine.placement())
        state = find_state(model)
        assert state is not None
        engine.prepare(model)
        masked = "sparse_base" in WAYS[arm.way]
        if masked and seed == 0:
            self.same("before training", mean_loss(engine.model, held_out, self.pad), self.loss_of(arm, base))
        loop = TrainingLoop(
            config=config,
            engine=engine,
            context=state.context,
            train_data=train,
            eval_data=None,
            sampler=GlobalBatchSampler(train.lengths, self.options.batch, 1, 1, seed, config.train.group_by_length),
            pad_token_id=self.pad,
            total_steps=steps,
            flops=flop_model(model, state),
        )
        began = time.perf_counter()
        if config.sparse_base.start == "gradient":
            start_at_gradient(loop, state.masked, config.sparse_base.start_rows)
        loop.run()
        trained = time.perf_counter() - began
        loss = mean_loss(engine.model, held_out, self.pad)
        row = {"steps": steps, "loss": loss, "training": round(trained, 1)}
        if arm.base != "dense":
            merged: Any = engine.model.merge_and_unload()
            row["filled"] = put_zeros_back(merged, AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False))
            if masked and row["filled"]:
                raise SystemExit(f"{arm}, seed {seed}: merging filled in {row['filled']} zeros of the base")
            if not masked:
                row["zeros back"] = mean_loss(merged, held_out, self.pad)
            elif seed == 0:
                self.same("merged", mean_loss(merged, held_out, self.pad), loss)
        engine.close()
        return row

    def tune_in_rounds(self, arm: Arm, seed: int) -> dict[str, Any]:
        from pruned_losa import alike, tuned_in_rounds

        config = self.config(self.options.model, arm.task, seed, **WAYS[arm.way])
        output = self.folder / "rounds" / f"{arm.way}-{seed}"
        with nullcontext() if arm.way == "LoSA" else alike():
            merged, pruned, chosen = tuned_in_rounds(config, arm.base, output, self.options.sequences)
        weights = matrices(pruned).values()
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        if abs(zeros - float(arm.base.split()[1])) > 5e-3:  # Whole weights of a row, of each layer's share.
            raise SystemExit(f"{output} has {zeros:.2%} zeros, and should have those of {arm.base}")
        if filled := put_zeros_back(merged, pruned):
            raise SystemExit(f"{arm}, seed {seed}: merging filled in {filled} zeros of the base")
        loss = mean_loss(merged, self.texts[arm.task][1], self.pad)
        return {"steps": self.options.steps, "loss": loss, "filled": filled, "zeros": round(zeros, 4), **chosen}

    def loss_of(self, arm: Arm, base: str) -> float:
        key = (arm.task, arm.base)
        if key not in self.untuned:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
            self.untuned[key] = mean_loss(model, self.texts[arm.task][1], self.pad)
        return self.untuned[key]

    @staticmethod
    def same(when: str, one: float, other: float) -> None:
        if not abs(one - other) < SAME:
            raise SystemExit(f"a masked model, {when}, has a loss of {one:.6f}, and should have {other:.6f}")


def matrices(model: Any) -> dict[str, Tensor]:
    """Those that are pruned: the decoder layers' linears, by name."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, nn.Linear)
    }


@torch.no_grad()
def put_zeros_back(merged: Any, base: Any) -> int:
    """How many zeros of ``base`` are none in ``merged``; they are made zeros there."""
    filled, into = 0, matrices(merged)
    for name, weight in matrices(base).items():
        zero = weight == 0
        filled += int((into[name][zero] != 0).sum())
        into[name].masked_fill_(zero, 0)
    return filled


@torch.no_grad()
def mean_loss(model: Any, data: TokenDataset, pad: int) -> float:
    """Cross entropy per label, nats."""
    training = model.training
    model.eval()
    order, total = sorted(range(len(data)), key=data.lengths.__getitem__), 0.0
    for start in range(0, len(order), 16):
        batch = collate(data, order[start : start + 16], pad)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += labels * model(**batch, use_cache=False).loss.item() if labels else 0.0
    model.train(training)
    return total / int(data.label_counts.sum())


def run(options: argparse.Namespace) -> None:
    """Every arm and seed that DIR lacks."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    same = {k: v for k, v in vars(options).items() if k not in ("command", "output", "seeds", "groups")}
    settings = folder / "settings.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")) != same:
        raise SystemExit(f"{settings} holds other settings: use another --output, or repeat the command as it was")
    settings.write_text(json.dumps(same, indent=1), encoding="utf-8")
    disable_progress_bar()
    done = {(Arm(row["task"], row["base"], row["way"]), row["seed"]) for row in read_rows(folder)}
    every = [arm for group in options.groups for arm in arms(group)]
    missing = [
        (arm, seed)
        for seed, arm in itertools.product(range(options.seeds), every)
        if (arm, seed) not in done and (arm.way != "untuned" or seed == 0)
    ]
    if not missing:
        return
    harness = Harness(options)
    for arm, seed in missing:
        row = harness.run(arm, seed)
        with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{arm.task}, {arm.base}, {arm.way}, seed {seed}: loss {row['loss']:.4f}, {row['seconds']} s", flush=True)


# --- commands ---------------------------------------------------------------------------------------------------------


def parser_of_run(command: argparse.ArgumentParser) -> None:
    """What is pruned, on what, and how it is tuned."""
    command.add_argument("--model", required=True, help="folder")
    command.add_argument("--data", required=True, help="folder with math/ and commonsense/")
    command.add_argument("--output", required=True, metavar="DIR")
    command.add_argument("--lora-rank", type=int, default=16)
    command.add_argument("--steps", type=int, default=40)
    command.add_argument("--batch", type=int, default=8, help="rows per step")
    command.add_argument("--learning-rate", type=float, default=2e-3)
    command.add_argument("--max-length", type=int, default=160)
    command.add_argument("--eval-rows", type=int, default=120)
    command.add_argument("--sequences", type=int, default=64, help="of --max-length tokens, for calibration")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="prune, tune and evaluate what DIR lacks")
    parser_of_run(command)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS[:3]), metavar="GROUP")
    show = commands.add_parser("table", help="print the tables of DIR")
    show.add_argument("output", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(options)
    else:
        print("\n".join(table(read_rows(Path(options.output)))))


if __name__ == "__main__":
    main(sys.argv[1:])
