"""Every format of the frozen weights under every engine: the same bytes, half of them on each of two ranks, the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.formats_workers import CASES

from .test_agreement import assert_same_run


@pytest.mark.parametrize("case", CASES)
def test_shards_gather_to_one_processs_bytes(single: Any, sharded: Any, case: str) -> None:
    """Before training and after it."""
    whole = single[0]["formats"][case]["start"]
    for rank in (*single, *sharded):
        found = rank["formats"][case]
        for moment in ("start", "after"):
            assert found[moment].keys() == whole.keys() and len(whole) >= 2 * 3 * 7
            for name, part in whole.items():
                assert torch.equal(found[moment][name], part), (moment, name)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_share(single: Any, sharded: Any, case: str) -> None:
    """Codes and what belongs to them, together."""
    whole = single[0]["formats"][case]["start"]
    total = sum(part.nbytes for part in whole.values())
    parts = {name.rsplit(".", 1)[1] for name in whole}
    for rank in sharded:
        local = {k: p["local"] for k, p in rank["formats"][case]["held"].items() if k.rsplit(".", 1)[1] in parts}
        assert len(local) == len(whole)
        assert sum(local.values()) == pytest.approx(total / 2, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(single: Any, sharded: Any, case: str) -> None:
    for rank in sharded:
        assert_same_run(single[0]["formats"][case]["run"], rank["formats"][case]["run"])
