"""What does a format of the frozen weights cost, and what does tuning bring back? One model in every format, tuned alike.

    python benchmarks/format_quality.py run --model M --data DATA --output DIR --seeds 3
    python benchmarks/format_quality.py table DIR

DATA holds ``math/`` (train.jsonl, eval.jsonl) and ``commonsense/``. ``run`` appends a row to DIR/rows.jsonl for every
finished arm and seed and skips the finished ones, so that it can be stopped and continued; calibrated formats are made once
by ``sparselora-dist quantize``, in DIR/bases, and once more with LoftQ's start. Arms of one seed share the adapter's start,
but for LoftQ's, and the order of the rows.

Checked before a row is written, and an error otherwise: the frozen weights are bit-identical after training, and a
format's start is one loss on every seed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.codecs import FrozenLinear
from sparselora_dist.config.run import RunConfig
from sparselora_dist.data import GlobalBatchSampler, TokenDataset, load_dataset_tokens, padding_id
from sparselora_dist.engines import make_engine
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.io.start_adapter import completed, read_start
from sparselora_dist.train.loop import TrainingLoop
from sparselora_dist.train.metrics import flop_model

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from pruned_arms import write_general_text
from pruned_quality import LINEARS, mean_loss, parser_of_run
from quality import read_rows, spread

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"format": "fp8"},
    "nf4": {"format": "nf4"},
    "hqq 4": {"format": "hqq", "bits": 4},
    "hqq 3": {"format": "hqq", "bits": 3},
    "bcq 3": {"format": "bcq", "bits": 3},
    "shiftadd 3": {"format": "shiftadd", "bits": 3},
    "shiftadd 3, calibrated": {"format": "shiftadd", "bits": 3},
    "billm": {"format": "billm"},
    "bcq 2": {"format": "bcq", "bits": 2},
}
"""By name, the ``quantization`` section."""
CALIBRATED = ("shiftadd 3, calibrated", "billm")
"""Made by ``sparselora-dist quantize`` with the training texts."""
FEW_BITS = ("hqq 3", "bcq 3", "shiftadd 3", "shiftadd 3, calibrated", "billm", "bcq 2")
"""Those that also begin as LoftQ does: 3 bits and less."""
# Context tokens of all layers but the first two and the last.
SPARSE = {"enabled": True, "layers": {"ffn": {"2-6": 0.9}}, "rank": 8, "start_step": 0.05}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "SparseLoRA": {"sparse_lora": SPARSE},
    "LoRA, LoftQ start": {"lora": LOFTQ},
    "SparseLoRA, LoftQ start": {"lora": LOFTQ, "sparse_lora": SPARSE},
}
"""Way of tuning -> sections of the run that it sets."""
TASKS = ("general", "math")


@dataclass(frozen=True, slots=True)
class Arm:
    """A row of the table, at every seed."""

    task: str
    format: str
    way: str


def arms(task: str) -> Iterator[Arm]:
    for way, name in itertools.product(WAYS, FORMATS):
        # Every token of the general text is learnt: it has no context to leave channels out for.
        if (task == "math" or "Sparse" not in way) and ("LoftQ" not in way or name in FEW_BITS):
            yield Arm(task, name, way)


class Harness:
    """The texts and the calibrated bases that all arms share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.output)
        data, rows = Path(options.data), options.batch * options.steps
        self.paths = {
            "general": write_general_text(data, self.folder, 4 * rows, options.eval_rows),
            "math": (data / "math" / "train.jsonl", data / "math" / "eval.jsonl"),
        }
        tokenizer = load_tokenizer(self.config(Arm("general", "bf16", "LoRA"), 0).model)
        self.pad = padding_id(tokenizer)
        self.texts: dict[str, tuple[TokenDataset, TokenDataset]] = {}
        for task in options.tasks:
            train, held_out = self.paths[task]
            self.texts[task] = (
                load_dataset_tokens(str(train), tokenizer, options.max_length, "train", rows),
                load_dataset_tokens(str(held_out), tokenizer, options.max_length, "validation", options.eval_rows),
            )
        self.starts: dict[tuple[str, str], float] = {}

    def base(self, name: str, lora: dict[str, Any]) -> str:
        """The folder of a format's base; quantised now if it is calibrated and not there."""
        if name not in CALIBRATED:
            return str(self.options.model)
        started = "init_lora_weights" in lora
        output = self.folder / "bases" / (name.replace(", ", "-").replace(" ", "") + "-loftq" * started)
        section = FORMATS[name]
        if not output.is_dir():
            command = [sys.executable, "-m", "sparselora_dist.cli", "quantize", "--model", self.options.model]
            command += ["--format", section["format"], "--data", str(self.paths["general"][0])]
            command += ["--bits", str(section["bits"])] if "bits" in section else []
            command += ["--sequences", str(self.options.sequences), "--length", str(self.options.max_length)]
            if started:
                (self.folder / "lora.json").write_text(json.dumps({"lora": lora}), encoding="utf-8")
                command += ["--loftq", str(self.folder / "lora.json")]
            subprocess.run([*command, "--output", str(output)], check=True)
        return str(output)

    def config(self, arm: Arm, seed: int) -> RunConfig:
        options, rank, way = self.options, self.options.lora_rank, WAYS[arm.way]
        lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEARS, **way.get("lora", {})}
        return RunConfig.from_dict(
            {
                "model": {"name_or_path": self.base(arm.format, lora), "dtype": "float32"},
                "quantization": FORMATS[arm.format],
                "lora": lora,
                "sparse_lora": way.get("sparse_lora", {"enabled": False}),
                "data": {"train": str(self.paths[arm.task][0]), "max_length": options.max_length},
                "train": {
                    "output_dir": str(self.folder / "log"),
                    "max_steps": options.steps,
                    "learning_rate": options.learning_rate,
                    "warmup_ratio": 0.05,
                    "per_device_train_batch_size": options.batch,
                    "seed": seed,
                    "disable_tqdm": True,
                },
            }
        )

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train and evaluate; a row of the table."""
        started, config = time.perf_counter(), completed(self.config(arm, seed))
        train, held_out = self.texts[arm.task]
        engine = make_engine(config)
        engine.total_steps = steps = self.options.steps
        set_seed(seed)
        model, _ = build_model(config, engine.placement(), start=read_start(config))
        state = find_state(model)
        assert state is not None
        engine.prepare(model)
        before, frozen = mean_loss(engine.model, held_out, self.pad), frozen_hash(model)
        if "LoftQ" not in arm.way and abs(self.starts.setdefault((arm.task, arm.format), before) - before) > 1e-6:
            raise SystemExit(f"{arm}, seed {seed}: starts at a loss of {before}, another seed did not")
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
        loop.run()
        trained = time.perf_counter() - began
        if frozen_hash(model) != frozen:
            raise SystemExit(f"{arm}, seed {seed}: a frozen weight has changed")
        values, size = stored(model)
        row = {"task": arm.task, "format": arm.format, "way": arm.way, "seed": seed, "steps": steps}
        row |= {"bytes": size, "bits": 8 * size / values, "before": before}
        row |= {"loss": mean_loss(engine.model, held_out, self.pad), "training": round(trained, 1)}
        engine.close()
        return {**row, "seconds": round(time.perf_counter() - started, 1)}


def matrices(model: Any) -> list[FrozenLinear]:
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


def stored(model: Any) -> tuple[int, int]:
    """Weights of the decoder layers' matrices, and the bytes that they take (of ``bf16``: as the files have them)."""
    found = matrices(model)
    values = sum(linear.in_features * linear.out_features for linear in found)
    plain = all(part.is_floating_point() for linear in found for part in linear.parts)
    return values, 2 * values if plain else sum(part.nbytes for linear in found for part in linear.parts)


def frozen_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for linear in matrices(model):
        for part in linear.parts:
            digest.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run(options: argparse.Namespace) -> None:
    """Every arm and seed that DIR lacks."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    same = {k: v for k, v in vars(options).items() if k not in ("command", "output", "seeds", "tasks", "formats")}
    settings = folder / "settings.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")) != same:
        raise SystemExit(f"{settings} holds other settings: use another --output, or repeat the command as it was")
    settings.write_text(json.dumps(same, indent=1), encoding="utf-8")
    disable_progress_bar()
    done = {(Arm(row["task"], row["format"], row["way"]), row["seed"]) for row in read_rows(folder)}
    every = [arm for task in options.tasks for arm in arms(task) if arm.format in options.formats]
    missing = [(arm, seed) for seed, arm in itertools.product(range(options.seeds), every) if (arm, seed) not in done]
    if not missing:
        return
    harness = Harness(options)
    for arm, seed in missing:
        row = harness.run(arm, seed)
        with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{arm.task}, {arm.format}, {arm.way}, seed {seed}: {row['before']:.4f} -> {row['loss']:.4f}, "
            f"{row['seconds']} s",
            flush=True,
        )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines, a table per task."""
    for task in dict.fromkeys(row["task"] for row in rows):
        yield f"| {task}: frozen weights | bits a weight | MB | tuned by | seeds | loss before | after | against bf16 |"
        yield "|---" * 8 + "|"
        for name, way in itertools.product(FORMATS, WAYS):
            mine = [row for row in rows if (row["task"], row["format"], row["way"]) == (task, name, way)]
            if not mine:
                continue
            plain = {
                row["seed"]: row["loss"]
                for row in rows
                if (row["task"], row["format"], row["way"]) == (task, "bf16", way.removesuffix(", LoftQ start"))
            }
            against = [100 * (row["loss"] / plain[row["seed"]] - 1) for row in mine if row["seed"] in plain]
            cells = [name, f"{mine[0]['bits']:.3f}", f"{mine[0]['bytes'] / 1e6:.2f}", way, str(len(mine))]
            cells += [
                spread([row["before"] for row in mine], "{:.4f}"),
                spread([row["loss"] for row in mine], "{:.4f}"),
            ]
            cells.append(spread(against, "{:+.2f}") + " %" if against and not math.isnan(against[0]) else "")
            yield f"| {' | '.join(cells)} |"
        yield ""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="tune and evaluate what DIR lacks")
    parser_of_run(command)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=["general"], metavar="TASK")
    command.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="FORMAT")
    show = commands.add_parser("table", help="print the tables of DIR")
    show.add_argument("output", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(options)
    else:
        print("\n".join(table(read_rows(Path(options.output)))))


if __name__ == "__main__":
    main(sys.argv[1:])
