"""When the sparse steps are: dense before ``start_step`` and from ``end_step`` on (SparseLoRA, section 3.3)."""

from __future__ import annotations


def resolve_step(value: float | int, total_steps: int) -> float:
    """A float is a fraction of the run, an int is a step number."""
    return value * total_steps if isinstance(value, float) else value


def is_sparse_step(step: int, total_steps: int, start: float | int, end: float | int | None) -> bool:
    """Whether optimizer step ``step`` (from 0) of ``total_steps`` is sparse: ``start <= step < end``."""
    last = total_steps if end is None else resolve_step(end, total_steps)
    return resolve_step(start, total_steps) <= step < last
