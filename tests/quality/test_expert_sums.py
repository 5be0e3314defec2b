"""Inspection of routed experts: exact factors recall everything, and the masks are those of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import estimator_factors
from sparselora_dist.io.weights import ModelWeights
from sparselora_dist.quality.observe import Observer, observe
from support.every_type import rows
from support.mixtures import mixture


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_observed(family: str) -> None:
    model: Any = mixture(family, parameters=[])
    sparsity, data = {"experts": {0: 0.6, 2: 0.75}}, rows()
    factors = estimator_factors(model, sparsity, SparseLoRAConfig(rank=64), ModelWeights(model))
    observer = Observer(model, sparsity, factors, ranks=[24, 64], own_rank=24)
    seen = observe(model, observer, [data, data], torch.device("cpu"))
    assert {(site.layer, site.group) for site in seen.sites} == {(0, "experts"), (2, "experts")}
    for site in seen.sites:
        assert site.recall["exact"] == [1.0] * 2 and min(site.recall["64"]) > 0.99
        assert site.recall["random"][0] < site.recall["24"][0] and site.steps == [1.0] and len(site.ranks) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())
    config = SparseLoRAConfig(rank=24, layers={"experts": {"0": 0.6}})
    apply_sparselora(model.train(), config)
    model(**data)
    chosen = observer.sites[0, "experts"].last
    assert chosen is not None and torch.equal(chosen, selection(model)[0]["experts"])
