"""What pruned_quality.py compares: the bases, the ways of tuning them, and the texts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASES = {
    f"{method} {pattern}": (method, pattern)
    for pattern in ("0.5", "2:4")
    for method in ("magnitude", "wanda", "sparsegpt")
}
"""Name -> method and pattern. ``dense`` is the model as it was given."""
LOSA_BASE = "wanda 0.7"
"""Where LoSA is compared: at half of the weights the gap is too small for layers to matter."""

MASKED = {"enabled": True}
WAYS: dict[str, dict[str, Any]] = {
    "untuned": {},
    "plain": {},
    "masked": {"sparse_base": MASKED},
    "straight": {"sparse_base": {**MASKED, "gradient": "straight_through"}},
    "straight, gradient start": {"sparse_base": {**MASKED, "gradient": "straight_through", "start": "gradient"}},
    "exact, gradient start": {"sparse_base": {**MASKED, "start": "gradient"}},
    # Context tokens of all layers but the first two and the last.
    "masked + SparseLoRA": {
        "sparse_base": MASKED,
        "sparse_lora": {"enabled": True, "layers": {"ffn": {"2-6": 0.9}}, "rank": 8, "start_step": 0.05},
    },
    "masked, rank 10": {"sparse_base": MASKED, "lora_rank": 10},
    # Five rounds of pruning and tuning, and as many steps in all. Mean rank 6 to 10, 10 in the last round's 60 %.
    "five rounds, uniform": {"lora_rank": 10},
    "LoSA": {"lora_rank": 10},
}
"""Way of tuning -> sections of the run that it sets, and the rank. ``plain`` is LoRA; it fills the zeros in."""
ROUNDS = ("five rounds, uniform", "LoSA")
"""Those that prune themselves."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table, at every seed; ``untuned`` has one seed."""

    task: str
    base: str
    way: str


def arms(group: str) -> Iterator[Arm]:
    """Of one of GROUPS."""
    if group == "general":
        yield from (Arm("general", base, "untuned") for base in ("dense", *BASES))
        yield Arm("general", "dense", "plain")
        for base in BASES:
            yield Arm("general", base, "plain")
            yield Arm("general", base, "masked")
    elif group == "math":
        yield from (Arm("math", base, "untuned") for base in ("dense", *BASES))
        yield Arm("math", "dense", "plain")
        yield Arm("math", "wanda 2:4", "plain")
        yield Arm("math", "wanda 2:4", "masked")
    elif group == "sparse":
        yield Arm("math", "wanda 2:4", "masked + SparseLoRA")
    elif group == "starts":
        for way in ("straight", "straight, gradient start", "exact, gradient start"):
            yield Arm("general", "wanda 2:4", way)
    elif group == "losa":
        for way in ("untuned", "masked, rank 10", "five rounds, uniform", "LoSA"):
            yield Arm("general", LOSA_BASE, way)


GROUPS = ("general", "math", "sparse", "losa", "starts")

COMMONSENSE = ("boolq", "arc_easy", "openbookqa")


def write_general_text(data: Path, folder: Path, train_rows: int, eval_rows: int) -> tuple[Path, Path]:
    """``general_train.jsonl`` and ``general_eval.jsonl`` in ``folder``: the three commonsense sets' rows, as many of each,
    written as the base saw them, the answer on the line below the question. Every token is learnt."""
    paths = []
    for split, source, count in (("train", "train", train_rows), ("eval", "test", eval_rows)):
        texts: list[str] = []
        for name in COMMONSENSE:
            lines = (data / "commonsense" / f"{name}_{source}.jsonl").read_text(encoding="utf-8").splitlines()
            chosen = random.Random(0).sample(lines, min(len(lines), count // len(COMMONSENSE)))
            texts += [f"{row['instruction']}\n{row['output'].strip()}" for row in map(json.loads, chosen)]
        random.Random(0).shuffle(texts)
        paths.append(folder / f"general_{split}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths[0], paths[1]
