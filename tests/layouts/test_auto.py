"""``"auto"``: every layer that can, and what is said of the others."""

from __future__ import annotations

import logging

import pytest
import torch

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.apply.fit import fit_run
from sparselora_dist.config import RunConfig
from sparselora_dist.layouts import UnsupportedModelError, decoder_layers
from support.every_type import tiny_config, tiny_model


def test_a_hybrid_has_attention_in_some_layers(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("olmo_hybrid").requires_grad_(False)
    config = SparseLoRAConfig.from_dict({"layers": {"ffn": {"auto": 0.5, "1": 0.25}, "vo": {"auto": 0.5}}, "rank": 2})
    with caplog.at_level(logging.INFO, logger="sparselora_dist"):
        apply_sparselora(model, config)
    assert find_state(model).sparsity == {"ffn": {0: 0.5, 1: 0.25, 2: 0.5, 3: 0.5}, "vo": {3: 0.5}}
    (said,) = [record.message for record in caplog.records if "stays dense" in record.message]
    assert said.startswith("vo stays dense in layers 0, 1, 2: it has no attention")


def test_looking_draws_no_random_number() -> None:
    """Else the adapters of a run would begin as others."""
    model = tiny_model("llama")
    before = torch.get_rng_state()
    assert decoder_layers(model)[0].ffn is not None
    assert torch.equal(before, torch.get_rng_state())


def test_a_named_layer_that_cannot_is_refused() -> None:
    model = tiny_model("olmo_hybrid").requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.qk names layer 2, but it has no attention.*can: 3$"):
        apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": {"qk": {"2-3": 0.5}}}))


def test_a_run_refuses_what_has_no_known_layer_before_it_loads() -> None:
    data = {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "train": {"output_dir": "x"}}
    sparse = {"sparse_lora": {"layers": {"ffn": {"0": 0.5}}}}
    with pytest.raises(UnsupportedModelError, match=r"'rwkv'\) is not supported: .* not known \(ffn: .*RwkvFeedForward"):
        fit_run(RunConfig.from_dict(data | sparse), tiny_config("rwkv"))
