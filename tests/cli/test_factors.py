"""sparselora-dist factors: a file that the run takes, with factors that estimate its data better than plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselora_dist import selection
from sparselora_dist.apply import find_state
from sparselora_dist.apply.build import build_model
from sparselora_dist.cli import main
from sparselora_dist.config import RunConfig
from sparselora_dist.data import collate, load_dataset_tokens, padding_id
from sparselora_dist.engines import make_engine
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.layouts import decoder_layers

DEMO = Path(__file__).resolve().parents[2] / "demo"


def _config(folder: Path, **sparse: Any) -> Path:
    data = {
        "model": {"name_or_path": str(DEMO / "model"), "dtype": "float32"},
        "sparse_lora": {"layers": {"ffn": {"0-4": 0.9}, "qk": {"0-4": 0.5}, "vo": {"0-4": 0.5}}, "rank": 4, **sparse},
        "data": {"train": str(DEMO / "data" / "train.jsonl"), "max_length": 256},
        "train": {"output_dir": str(folder / "out")},
        "engine": {"name": "fsdp2"},
    }
    path = folder / "run.json"
    path.write_text(json.dumps(data))
    return path


def _kept(path: Path) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Layer -> neurons kept by the estimator and by exact activations, on rows that the factors have not seen."""
    config = RunConfig.from_file(path, ["--engine.name", "single"])
    engine = make_engine(config)
    tokenizer = load_tokenizer(config.model)
    rows = load_dataset_tokens(config.data.train, tokenizer, 256, limit=40)
    model, _ = build_model(config, engine.placement())
    inputs: dict[int, torch.Tensor] = {}
    for layer in decoder_layers(model):
        layer.module.mlp.register_forward_pre_hook(
            lambda _, args, k=layer.index: inputs.update({k: args[0].flatten(0, 1)})
        )
    model(**collate(rows, [36, 37, 38, 39], padding_id(tokenizer)))
    # The last layer's FFN runs at label positions only and chooses no neurons.
    chosen = {k: set(groups["ffn"].tolist()) for k, groups in selection(model).items() if "ffn" in groups}
    state = find_state(model)
    assert state is not None and state.context.last is not None and state.context.last.partition is not None
    context = state.context.last.partition.context
    exact = {}
    for layer in decoder_layers(model)[: len(chosen)]:
        x, mlp = inputs[layer.index][context], layer.module.mlp
        gate, up = (m.base_layer(x) if hasattr(m, "base_layer") else m(x) for m in (mlp.gate_proj, mlp.up_proj))
        score = (mlp.act_fn(gate) * up).square().sum(0)
        exact[layer.index] = set(score.topk(len(chosen[layer.index])).indices.tolist())
    return chosen, exact


def _hits(chosen: dict[int, set[int]], exact: dict[int, set[int]]) -> int:
    return sum(len(chosen[layer] & exact[layer]) for layer in exact)


def test_the_file_is_taken_and_keeps_more_of_the_right_neurons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "factors.safetensors"
    before = _hits(*_kept(_config(tmp_path)))
    assert main(["factors", "--config", str(_config(tmp_path)), "--output", str(file), "--rows", "32"]) == 0
    assert "rank 4 factors of 25 matrices, weighted by 32 rows" in capsys.readouterr().out
    assert _hits(*_kept(_config(tmp_path, factors=str(file)))) > before


def test_no_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["factors", "--config", str(_config(tmp_path)), "--output", str(tmp_path / "f"), "--rows", "0"]
    assert main(command) == 2
    assert "--rows must be at least 1, got 0" in capsys.readouterr().err
