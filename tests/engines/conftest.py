"""One process start per engine: all of its cases run in it, and the tests look at what came out."""

from __future__ import annotations

from typing import Any

import pytest

from support.harness import run_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("support.engine_workers:zero3", 2, str(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def fsdp2(zero3: Results) -> Results:
    """Also continues from the state that ZeRO-3 left."""
    return run_ranks("support.engine_workers:fsdp2", 2, zero3[0]["state"]["kept"])


@pytest.fixture(scope="session")
def fsdp2_on_four() -> Results:
    return run_ranks("support.engine_workers:fsdp2_on_four", 4)


@pytest.fixture(scope="session")
def zero3_on_four() -> Results:
    return run_ranks("support.engine_workers:zero3_on_four", 4)


@pytest.fixture(params=["zero3", "fsdp2"])
def on_four(request: pytest.FixtureRequest) -> Results:
    """Either sharding engine on 4 ranks."""
    return request.getfixturevalue(f"{request.param}_on_four")


@pytest.fixture(scope="session")
def single(zero3: Results, fsdp2: Results) -> Results:
    """The reference of all others; also continues from the states that ZeRO-3 and FSDP2 left."""
    return run_ranks("support.engine_workers:single", 1, zero3[0]["state"]["kept"], fsdp2[0]["moved"]["state"])


@pytest.fixture(params=["zero3", "fsdp2"])
def sharded(request: pytest.FixtureRequest) -> Results:
    """Either sharding engine on 2 ranks."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["single", "zero3", "fsdp2"])
def engine(request: pytest.FixtureRequest) -> Results:
    """Every engine."""
    return request.getfixturevalue(request.param)
