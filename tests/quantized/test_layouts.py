"""HSDP, replication and hpZ: the training of one process, with the shards that the layout promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselora_dist.config import ConfigError, EngineSection
from sparselora_dist.engines.fsdp2 import FSDP2Engine
from support.compare import assert_close
from support.harness import run_ranks
from support.nf4_workers import nf4_config
from support.versions import can_nf4, nf4_case

ENDINGS = ("codes", "scales", "_a", "_b")
ENGINES = {"hsdp": "fsdp2", "replicated": "fsdp2", "hpz": "zero3"}
SHARDS = {"hsdp": 2, "replicated": 1, "hpz": 4}


@pytest.fixture(scope="module")
def four(base: Path) -> list[dict[str, Any]]:
    names = [layout for layout, engine in ENGINES.items() if can_nf4(engine)]
    return run_ranks("support.nf4_workers:layouts", 4, str(base), names)


@pytest.mark.parametrize("layout", [nf4_case(engine, layout) for layout, engine in ENGINES.items()])
def test_trains_as_one_process(four: Any, single: Any, layout: str) -> None:
    reference = single[0]["sparse"]
    for rank in four:
        run = rank[layout]["run"]
        assert run["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        for step, parameters in enumerate(reference["parameters"]):
            for name, value in parameters.items():
                assert_close(f"step {step} {name}", value, run["parameters"][step][name], rtol=2e-4, atol=2e-5)
        for name, part in single[0]["start"].items():
            assert torch.equal(rank[layout]["parts"][name], part), name


@pytest.mark.parametrize("layout", [nf4_case(engine, layout) for layout, engine in ENGINES.items()])
def test_holds_what_the_layout_says(four: Any, layout: str) -> None:
    shards = SHARDS[layout]
    for rank in four:
        for name, p in rank[layout]["held"].items():
            if name.endswith(ENDINGS):
                whole = torch.Size(p["shape"]).numel()
                unit = whole // p["shape"][0]
                assert abs(p["local"] - whole / shards) <= unit, (layout, name, p)


def test_hpz_keeps_a_second_copy_inside_the_node(four: Any) -> None:
    for rank in four:
        secondary, held = rank["hpz"]["secondary"], rank["hpz"]["held"]
        assert len([name for name in secondary if name.endswith("codes")]) == 21
        for name, count in secondary.items():
            assert abs(count - torch.Size(held[name]["shape"]).numel() / 2) <= 2, name


def test_sizes_that_do_not_make_up_the_ranks_are_refused() -> None:
    engine = EngineSection(name="fsdp2", fsdp={"fsdp_version": 2, "dp_shard_size": 3})
    with pytest.raises(ConfigError, match=r"dp_replicate_size auto and dp_shard_size 3 do not make up 4 ranks"):
        engine.fsdp_mesh(4)
    assert engine.fsdp_mesh(6) == (2, 3)
    assert EngineSection(name="fsdp2").fsdp_mesh(6) == (1, 6)
    with pytest.raises(ConfigError, match="dp_shard_size"):
        EngineSection(name="fsdp2", fsdp={"fsdp_version": 2, "dp_shard_size": 0})


def test_fsdp2_refuses_nf4_before_torch_2_12(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its weights would go is asked first: nothing has been loaded then."""
    engine: Any = SimpleNamespace(config=nf4_config("fsdp2", "tiny"))
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with pytest.raises(ValueError, match=r"'fsdp2' .* needs torch 2\.12 \(this is 2\.11\.0.*use engine.name 'zero3'"):
        FSDP2Engine.placement(engine)
