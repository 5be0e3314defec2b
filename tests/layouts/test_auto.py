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
    with pytest.raises(
        UnsupportedModelError, match=r"'rwkv'\) is not supported: .* not known \(ffn: .*RwkvFeedForward"
    ):
        fit_run(RunConfig.from_dict(data | sparse), tiny_config("rwkv"))


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_inside_an_ffn_is_seen(training: bool) -> None:
    """Seed-OSS drops behind its down matrix, by the function: a sparse FFN would not."""
    config = tiny_config("seed_oss")
    config.residual_dropout = 0.1
    model = tiny_model("seed_oss", config).train(training)
    before = torch.get_rng_state()
    assert "computes something else" in decoder_layers(model)[0].missing["ffn"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("limit", [10.0, 12.0, 100.0])
def test_a_clamp_is_seen(limit: float) -> None:
    """DeepSeek V4 clamps gate and up: its shared experts are refused, of its routed ones the family's own gate is kept."""
    config = tiny_config("deepseek_v4")
    config.swiglu_limit = limit
    layer = decoder_layers(tiny_model("deepseek_v4", config))[0]
    assert "computes something else" in layer.missing["ffn"]
    assert layer.experts is not None and layer.experts.activation is None
