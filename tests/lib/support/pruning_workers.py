"""Pruning on ranks: every method, half of the weights and 2:4, of the demo model."""

from __future__ import annotations

from pathlib import Path

from sparselora_dist.pruning.pattern import Pattern
from sparselora_dist.pruning.prune import Pruning, prune

from .harness import ROOT

SEQUENCES, LENGTH = 10, 64
PATTERNS = {"0.5": Pattern.share(0.5), "2:4": Pattern.parse("2:4")}


def asked_of(method: str, pattern: str, folder: Path) -> Pruning:
    return Pruning(
        model=str(ROOT / "demo" / "model"),
        method=method,
        pattern=PATTERNS[pattern],
        output=folder / f"{method}-{pattern}",
        data=str(ROOT / "demo" / "data" / "train.jsonl"),
        sequences=SEQUENCES,
        length=LENGTH,
    )


def pruned_files(folder: str, cases: list[tuple[str, str]]) -> None:
    for case in cases:
        prune(asked_of(*case, Path(folder)))
