"""The sums of a run and of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Totals:
    """Running sums of a run; saved with its checkpoints, so that a resumed run's summary is the whole run's."""

    tokens: float = 0.0
    context: float = 0.0
    flops_dense: float = 0.0
    flops_executed: float = 0.0
    timed_tokens: float = 0.0
    seconds: float = 0.0
    loss_first: float = math.nan
    loss_last: float = math.nan
    eval_start: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class StepResult:
    """What one optimizer step says to everyone, already summed over ranks."""

    loss: float
    grad_norm: float
    context: float
    """Tokens computed sparsely."""
