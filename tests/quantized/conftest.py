"""One process start per engine and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.harness import run_ranks
from support.models import tiny_base
from support.nf4_workers import SHAPE
from support.versions import nf4_case

Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("base")
    tiny_base(**SHAPE).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="session")
def single(base: Path) -> Results:
    return run_ranks("support.nf4_workers:run", 1, "single", str(base))


@pytest.fixture(
    scope="session",
    params=[nf4_case(name, (name, ranks), id=f"{name}-{ranks}") for ranks in (2, 4) for name in ("zero3", "fsdp2")],
)
def sharded(request: pytest.FixtureRequest, base: Path) -> Results:
    name, ranks = request.param
    return run_ranks("support.nf4_workers:run", ranks, name, str(base))
