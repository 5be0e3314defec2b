"""A pruned base under every engine: the same run as in one process, and not a zero lost, from training to merged files."""

from __future__ import annotations

from typing import Any

import pytest

from support.models import ALL_LINEAR
from support.pruned_workers import CASES

from .test_agreement import assert_same_run


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(single: Any, sharded: Any, case: str) -> None:
    if "bfloat16" in case:
        pytest.skip("16-bit gradients are reduced in other precisions: only the zeros are compared")
    for rank in sharded:
        assert_same_run(single[0]["pruned"][case]["run"], rank["pruned"][case]["run"])


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_is_masked_and_stays_as_it_was(engine: Any, case: str) -> None:
    for rank in engine:
        found = rank["pruned"][case]
        assert len(found["masked"]) == 3 * len(ALL_LINEAR)
        assert found["same"], "a frozen matrix has changed"
