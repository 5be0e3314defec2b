"""Recomputation restores random states only where something draws random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist.apply.build import build_model, drops
from sparselora_dist.config.run import RunConfig
from sparselora_dist.sharding.placement import Placement
from support.every_type import tiny_model
from support.models import tiny_base, tiny_lora


@pytest.mark.parametrize(
    ("options", "expected"), [({}, False), ({"dropout": 0.1}, True), ({"attention_dropout": 0.1}, True)]
)
def test_who_draws(options: dict[str, Any], expected: bool) -> None:
    assert drops(tiny_lora(**options)) is expected


def test_a_probability_that_is_a_number_of_the_layer_draws() -> None:
    """OPT drops what its layers give by ``functional.dropout``."""
    assert not drops(tiny_model("opt"))
    for layer in (model := tiny_model("opt")).model.decoder.layers:
        layer.dropout = 0.1
    assert drops(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (0.1, True)])
def test_a_run_asks_for_it_where_needed(
    tmp_path: Path,
    reentrant: bool,
    dropout: float,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base()
    base.save_pretrained(tmp_path)
    seen: list[dict[str, Any]] = []

    # Transformers' newer name of it ends here too.
    def enable(self: Any, gradient_checkpointing_kwargs: dict[str, Any], **_: Any) -> None:
        seen.append(gradient_checkpointing_kwargs)

    monkeypatch.setattr(type(base), "gradient_checkpointing_enable", enable)
    kwargs = {"use_reentrant": reentrant}
    config = RunConfig.from_dict(
        {
            "model": {"name_or_path": str(tmp_path), "dtype": "float32"},
            "data": {"train": "tiny.jsonl"},
            "lora": {"lora_dropout": dropout},
            "sparse_lora": {"enabled": False},
            "train": {
                "output_dir": "runs/tiny",
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": kwargs,
            },
            "engine": {"name": "single"},
        }
    )
    build_model(config, Placement(torch.device("cpu")))
    wanted = {"use_reentrant": reentrant, "preserve_rng_state": expected}
    assert seen == [wanted]
