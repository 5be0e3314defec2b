"""Every format of the frozen weights under every engine: the same bytes, half of them on each of two ranks, the same run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sparselora_dist.io.manifest import tensors_sha256
from support.formats_workers import CASES
from support.harness import run_ranks

from .test_agreement import assert_same_run


def nbytes(part: torch.Tensor) -> int:
    return part.nbytes


def row_bytes(part: torch.Tensor) -> int:
    return part.nbytes // len(part)


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


@pytest.mark.parametrize("ranks", [3, 7])
def test_any_number_of_ranks_has_the_same_parts(single: Any, ranks: int) -> None:
    """A share of them each, within a row of every matrix, under both engines."""
    found = run_ranks("support.formats_workers:loaded", ranks, ["zero3", "fsdp2"])
    for case, seen in single[0]["formats"].items():
        whole = seen["start"]
        total, rows = (sum(size(part) for part in whole.values()) for size in (nbytes, row_bytes))
        for rank, engine in itertools.product(found, ("zero3", "fsdp2")):
            same, here = rank[engine, case]
            assert same == tensors_sha256(whole), (engine, case)
            assert here <= total / ranks + rows, (engine, case)
        assert all(sum(rank[engine, case][1] for rank in found) >= total for engine in ("zero3", "fsdp2"))
