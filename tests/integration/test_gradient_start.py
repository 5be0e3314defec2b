"""``sparse_base.start: gradient``: adapters begin at the leading directions of the weight's gradient, on every engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparselora_dist.config.run import RunConfig
from sparselora_dist.data import GlobalBatchSampler, collate, load_dataset_tokens, padding_id
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.pruning.pattern import Pattern
from support.harness import run_ranks
from support.merging import load
from support.pruned_workers import prune_decoder
from support.trainer_workers import observe

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("alone")

FILE = "adapter/adapter_model.safetensors"
ROWS, RANK = 16, 4
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model, half of it zero."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = load(Path(tiny.model))
    prune_decoder(model, Pattern.share(0.5))
    model.save_pretrained(folder)
    load_tokenizer(RunConfig.from_dict(tiny.config("single", folder)).model).save_pretrained(folder)
    return folder


def starting(tiny: Tiny, base: Path, engine: str, out: Path, gradient: str) -> dict[str, Any]:
    """One step that changes nothing that fp32 shows."""
    train = {"max_steps": 1, "save_steps": None, "learning_rate": 1e-30}
    lora = {"r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    config = tiny.config(engine, out, train=train, data={"eval": None}, model={"name_or_path": str(base)})
    sparse_base = {"enabled": True, "gradient": gradient, "start": "gradient", "start_rows": ROWS}
    return config | {"lora": lora, "sparse_base": sparse_base}


def weight_gradients(config: dict[str, Any]) -> dict[str, Tensor]:
    """Of the frozen matrices, by a plain model that trains them, on the rows that the run begins with; not masked."""
    parsed = RunConfig.from_dict(config)
    tokenizer = load_tokenizer(parsed.model)
    data = load_dataset_tokens(parsed.data.train, tokenizer, parsed.data.max_length, "train")
    train = parsed.train
    size = 2 * train.per_device_train_batch_size * train.gradient_accumulation_steps
    sampler = GlobalBatchSampler(data.lengths, size, 1, 1, train.seed, train.group_by_length)
    model = load(Path(parsed.model.name_or_path)).train()
    for number in range(math.ceil(ROWS / size)):
        model(**collate(data, sampler.batch(number).indices.flatten(), padding_id(tokenizer))).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_the_best_that_rank_r_can_see_of_the_gradient(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    cases = [(engine, gradient) for engine in ("fsdp2", "zero3") for gradient in ("exact", "straight_through")]
    configs = [starting(tiny, base, engine, tmp_path / f"{engine}-{gradient}", gradient) for engine, gradient in cases]
    seen = run_ranks("support.trainer_workers:many_runs", 2, [(config, None) for config in configs], IDS)[0]
    seen.append(observe(starting(tiny, base, "single", tmp_path / "single", "exact"), IDS))
    expected = weight_gradients(configs[0])
    weights = {name: p.detach() for name, p in load(base).named_parameters()}
    for (engine, gradient), found in zip([*cases, ("single", "exact")], seen, strict=True):
        folder = tmp_path / (engine if engine == "single" else f"{engine}-{gradient}")
        saved = load_file(folder / FILE)
        factors = [key for key in saved if "lora_A" in key]
        assert len(factors) == 4 * 3
        assert found["summary"]["train_loss_first"] == pytest.approx(seen[-1]["summary"]["train_loss_first"], rel=1e-5)
        for key in factors:
            a, name = saved[key], key.removeprefix("base_model.model.").replace("lora_A.", "")
            assert not saved[key.replace("lora_A", "lora_B")].any(), "the model begins as its base"
            torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)
            whole = expected[name] * (weights[name] != 0) if gradient == "exact" else expected[name]
            best = torch.linalg.svdvals(whole)[:RANK].square().sum()
            assert (whole @ a.t()).square().sum() >= 0.9 * best, (engine, gradient, name)
    random = torch.linalg.qr(torch.randn(whole.shape[1], RANK)).Q
    assert (whole @ random).square().sum() < 0.7 * best, "chance would not pass"


def test_a_rank_above_a_matrix_side_is_refused_by_name(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    config = starting(tiny, base, "single", tmp_path / "wide", "exact")
    config["lora"] |= {"r": 4, "rank_pattern": {"up_proj": 1000}}
    with pytest.raises(ValueError, match=r"up_proj has rank 1000, but its matrix only \d+ directions: .*rank_pattern"):
        observe(config, IDS)
