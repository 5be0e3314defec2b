"""The schedule: sparse from ``start_step`` on, until ``end_step``; fractions of the run or step numbers."""

from __future__ import annotations

import pytest

from sparselora_dist.method.schedule import is_sparse_step


@pytest.mark.parametrize(
    ("start", "end", "sparse"),
    [
        (0.0, None, range(10)),
        (0, 1.0, range(10)),
        (0.05, None, range(1, 10)),
        (0.2, 0.5, range(2, 5)),
        (3, 7, range(3, 7)),
        (0.2, 4, range(2, 4)),
        (1, None, range(1, 10)),
        (0.0, 1, range(1)),
        (1.0, None, range(0)),
        (20, None, range(0)),
        (0.25, 0.35, range(3, 4)),
    ],
)
def test_sparse_steps_of_a_run_of_ten(start: float | int, end: float | int | None, sparse: range) -> None:
    assert [step for step in range(10) if is_sparse_step(step, 10, start, end)] == list(sparse)
