"""What the ranks of ``tests/engines`` run: all cases of one engine in one process start."""

from __future__ import annotations

from typing import Any

from .agreement_workers import CASES, ON_FOUR, agreement_case, loaded_partitioned
from .experts_workers import experts
from .formats_workers import formats
from .pruned_workers import pruned
from .sharding_workers import apply_after_fully_shard, family_names, sharding
from .state_workers import State, continue_from, variants


def zero3(folder: str) -> dict[str, Any]:
    state = continue_from("zero3", None, 0, 2)
    return {
        "agreement": {case: agreement_case("zero3", case) for case in CASES},
        "loaded partitioned": loaded_partitioned(folder),
        "experts": experts("zero3"),
        "formats": formats("zero3"),
        "pruned": pruned("zero3"),
        "variants": variants("zero3"),
        "sharding": sharding("zero3"),
        "state": state,
        "moved": continue_from("zero3", state["kept"], 2, 1),
    }


def fsdp2(from_zero3: State) -> dict[str, Any]:
    return {
        "agreement": {case: agreement_case("fsdp2", case) for case in CASES},
        "experts": experts("fsdp2"),
        "formats": formats("fsdp2"),
        "pruned": pruned("fsdp2"),
        "variants": variants("fsdp2"),
        "sharding": sharding("fsdp2"),
        "apply after": apply_after_fully_shard(),
        "family names": family_names(),
        "state": continue_from("fsdp2", None, 0, 2),
        "moved": continue_from("fsdp2", from_zero3, 2, 1),
    }


def fsdp2_on_four() -> dict[str, Any]:
    return {case: agreement_case("fsdp2", case) for case in ON_FOUR}


def zero3_on_four() -> dict[str, Any]:
    return {case: agreement_case("zero3", case) for case in ON_FOUR}


def single(from_zero3: State, from_fsdp2: State) -> dict[str, Any]:
    return {
        "agreement": {case: agreement_case("single", case) for case in CASES},
        "experts": experts("single"),
        "formats": formats("single"),
        "pruned": pruned("single"),
        "variants": variants("single"),
        "state": continue_from("single", None, 0, 2),
        "moved": continue_from("single", from_fsdp2, 3, 1),
        "reference": continue_from("single", from_zero3, 2, 2),
    }
