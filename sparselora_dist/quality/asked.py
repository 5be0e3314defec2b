"""What a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.errors import ConfigError, unknown_key
from ..config.sparse import GROUPS

LEVELS = (0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
# Rows of a micro-batch over all ranks, at least: the channels are chosen over that many.
_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What is asked for."""

    target_flops: float
    """Share of dense LoRA's FLOPs that a sparse step may execute, in (0, 1)."""
    output: Path
    """The folder that everything is written to."""
    groups: tuple[str, ...] = ()
    """What may be sparse; none named: every group that the model has."""
    levels: tuple[float, ...] = LEVELS
    """Sparsities that are measured and chosen from, in (0, 1)."""
    rows: int = 64
    """Rows of the training data that are measured on."""
    batch: int | None = None
    """Rows of a micro-batch over all ranks; None is the smallest multiple of the ranks from 8 on."""
    criterion: Literal["loss", "importance"] = "loss"
    command: str = ""
    """Kept in ``curves.json``."""

    def __post_init__(self) -> None:
        for group in self.groups:
            if group not in GROUPS:
                raise unknown_key("--groups", group, GROUPS)
        if len(set(self.groups)) < len(self.groups):
            raise ConfigError(f"'--groups' is {','.join(self.groups)!r}: allowed: {', '.join(GROUPS)}, each once")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ConfigError(
                f"'--levels' is {','.join(map(str, self.levels))!r}: allowed: sparsities above 0, below 1"
            )
        if not 0 < self.target_flops < 1:
            raise ConfigError(f"'--target-flops' is {self.target_flops:g}: allowed: a share above 0, below 1")
        if self.rows < 1 or (self.batch is not None and self.batch < 1):
            raise ConfigError(f"'--rows' is {self.rows}, '--batch' is {self.batch}: allowed: integers from 1")
        object.__setattr__(self, "levels", tuple(sorted(set(self.levels))))

    def batch_size(self, ranks: int) -> int:
        """Rows of a micro-batch over all ranks."""
        size = self.batch or -(-_BATCH // ranks) * ranks
        if size % ranks:
            raise ConfigError(f"'--batch' is {size}: allowed: multiples of the number of ranks ({ranks})")
        return size
