"""benchmarks/quality.py: every variant runs, a second call adds nothing, and the substitutions do what they are named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.layouts import decoder_layers
from support.compare import assert_close
from support.models import batch as tiny_batch
from support.models import tiny_lora

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"ffn": {"0-2": 0.75}, "qk": {"0-2": 0.5}, "vo": {"0-2": 0.5}}


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return _script("quality")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_gives_a_row_and_finished_ones_are_skipped(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, options = ROOT / "demo", ["--steps", "3", "--batch", "4", "--answers", "2", "--flops", "0.8"]
    command = ["run", "--preset", "tiny", "--model", str(demo / "model"), "--train", str(demo / "data" / "train.jsonl")]
    command += ["--eval", str(demo / "data" / "eval.jsonl"), "--eval-limit", "8", "--train-limit", "40", *options]
    command += ["--output", str(tmp_path), "--seeds", "1"]
    quality.main(command)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == list(quality.VARIANTS)
    by_name = {row["variant"]: row for row in rows}
    shares = {name: row["flops"] / row["plain_flops"] for name, row in by_name.items() if row["plain_flops"]}
    assert shares["global"] < shares["dense"] <= 1 and shares["no_split"] < shares["global"]
    assert len({by_name[name]["loss"] for name in ("dense", "global", "random", "no_split", "uniform")}) == 5
    assert by_name["global"]["loss"] != by_name["local"]["loss"]

    quality.main(command)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)
    with pytest.raises(SystemExit, match="other settings"):
        quality.main([*command, "--learning-rate", "0.5"])

    capsys.readouterr()
    quality.main(["table", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| no_split_flops |") for line in lines)
    assert sum(line.startswith("| 100 % |") for line in lines) == 2


def _sparse(rank: int) -> Any:
    model = tiny_lora()
    return apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": LAYERS, "rank": rank})).train()


def test_the_oracle_is_the_estimator_at_full_rank(quality: ModuleType) -> None:
    """The scores of every site, on the same hidden states."""
    full, oracle = _sparse(rank=48), _sparse(rank=2)
    quality.use_oracle(oracle)
    x, rows = torch.randn(23, 48), torch.arange(1, 23, 2)
    for ours, exact in zip(decoder_layers(full), decoder_layers(oracle)):
        for pair in ((ours.module.mlp, exact.module.mlp), (ours.module.self_attn, exact.module.self_attn)):
            low, high = (getattr(m, "estimator", None) or m.sparse_estimator for m in pair)
            for estimated, right in zip(low(x, rows), high(x, rows), strict=True):
                assert_close("scores", estimated, right, rtol=1e-3)


def _kept(model: Any, batch: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    model(**batch)
    return selection(model)


def test_random_channels_change_and_are_not_the_estimators(quality: ModuleType) -> None:
    batch, estimated, random = tiny_batch(), _sparse(rank=8), _sparse(rank=8)
    quality.use_random(random)
    first, second, chosen = _kept(random, batch), _kept(random, batch), _kept(estimated, batch)
    assert not torch.equal(first[1]["ffn"], second[1]["ffn"])
    assert not torch.equal(first[1]["ffn"], chosen[1]["ffn"])
    assert first[1]["ffn"].shape == chosen[1]["ffn"].shape


def test_without_the_split_every_real_token_is_context(quality: ModuleType) -> None:
    batch, model = tiny_batch(), _sparse(rank=8)
    context = find_state(model).context
    quality.use_no_split(context)
    model(**batch)
    real = batch["attention_mask"].flatten().nonzero().squeeze(1)
    assert torch.equal(context.last.partition.context, real)
    assert (context.counts.dense, context.counts.context) == (0, real.numel())


def test_calibration_meets_its_target_and_spares_what_matters(quality: ModuleType) -> None:
    """A scaled sparsity executes what was asked; the last layer's FFN, which no answer reads through context, goes first."""
    variants = sys.modules["quality_variants"]
    model, batch = _sparse(rank=8), tiny_batch()
    flops = quality.flop_model(model, find_state(model))
    budget = variants.Budget(model=flops, tokens=1000, context=700, labels=200, length=50)
    target = 0.5 * (budget.share({}) + budget.share({g: dict.fromkeys(range(3), 0.7) for g in LAYERS}))
    layers = variants.calibrate(model, [batch], budget, target, 0.0)
    assert budget.share(layers) <= target
    assert layers["ffn"][2] == max(variants.LEVELS["ffn"])
    everywhere = {group: dict.fromkeys(range(3), 0.5) for group in LAYERS}
    assert budget.share(variants.scaled(everywhere, target, budget, 0.0, split=True)) == pytest.approx(target, abs=0.02)
