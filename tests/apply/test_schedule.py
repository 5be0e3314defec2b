"""Which steps are sparse."""

from __future__ import annotations

import warnings

import pytest

from sparselora_dist import selection, set_step
from support.applied import outputs, sparse_model


@pytest.mark.parametrize(
    ("start", "end", "sparse"),
    [(2, 4, {2, 3}), (0.25, None, {2, 3, 4, 5}), (0.0, 0.5, {0, 1, 2}), (0.0, None, {*range(6)})],
)
def test_schedule(start: float | int, end: float | int | None, sparse: set[int]) -> None:
    model = sparse_model(start_step=start, end_step=end)
    seen = set()
    for step in range(6):
        set_step(model, step, 6)
        outputs(model)
        if selection(model):
            seen.add(step)
    assert seen == sparse


def test_a_schedule_that_nothing_drives_warns_once() -> None:
    model = sparse_model(start_step=0.05)
    with pytest.warns(UserWarning, match=r"start_step=0.05.*nothing drives the schedule.*SparseLoRACallback"):
        outputs(model)
    assert selection(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs(model)
        outputs(sparse_model())
