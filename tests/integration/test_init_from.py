"""``lora.init_from``: the first loss is PEFT's own on every engine, nothing is rounded, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparselora_dist.config.run import RunConfig
from sparselora_dist.data import GlobalBatchSampler, collate, load_dataset_tokens, padding_id
from sparselora_dist.io.load import load_tokenizer
from sparselora_dist.train import run
from support.harness import run_ranks
from support.merging import edit_json, load, make_adapter
from support.refusals import never_loads, says
from support.trainer_workers import branch_off, observe

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("alone")

FILE = "adapter_model.safetensors"
Q = "base_model.model.model.layers.1.self_attn.q_proj"
# Nothing of it is a run's default.
ADAPTER: dict[str, Any] = {
    "r": 6,
    "lora_alpha": 5,
    "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"down_proj": 11},
    "use_rslora": True,
    "target_modules": ["q_proj", "o_proj", "down_proj"],
    "lora_dropout": 0.0,
}
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "adapter"
    make_adapter(folder, Path(tiny.model), **ADAPTER)
    # As it is downloaded: frozen, and of a base that is called otherwise.
    edit_json(folder / "adapter_config.json", inference_mode=True, base_model_name_or_path="their/private-model")
    return folder


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the rank and alpha that the tiny runs say."""
    folder = tmp_path_factory.mktemp("start") / "plain"
    make_adapter(folder, Path(tiny.model), r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    return folder


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(plain, tmp_path / "broken")


def starting(tiny: Tiny, engine: str, out: Path, init_from: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """One step that changes nothing that fp32 shows."""
    train = {"max_steps": 1, "save_steps": None, "learning_rate": 1e-30, **sections.pop("train", {})}
    config = tiny.config(engine, out, train=train, data={"eval": None}, **sections)
    config["lora"] = {"init_from": str(init_from)} | sections.get("lora", {})
    return config


def first_loss(config: dict[str, Any], adapter: Path | None) -> float:
    """PEFT's own, of the rows that the run begins with."""
    parsed = RunConfig.from_dict(config)
    tokenizer = load_tokenizer(parsed.model)
    data = load_dataset_tokens(parsed.data.train, tokenizer, parsed.data.max_length, "train")
    rows = GlobalBatchSampler(data.lengths, 4, 1, 2, parsed.train.seed, parsed.train.group_by_length).batch(0).indices
    model = load(Path(parsed.model.name_or_path))
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    with torch.no_grad():
        return float(model(**collate(data, rows.flatten(), padding_id(tokenizer))).loss)


def test_the_first_loss_is_pefts_and_no_value_is_rounded(tiny: Tiny, adapter: Path, tmp_path: Path) -> None:
    bf16 = {"dtype": "bfloat16"}
    configs = {
        "single": starting(tiny, "single", tmp_path / "single", adapter),
        "fsdp2": starting(tiny, "fsdp2", tmp_path / "fsdp2", adapter),
        "zero3": starting(tiny, "zero3", tmp_path / "zero3", adapter),
        "fsdp2-bf16": starting(tiny, "fsdp2", tmp_path / "fsdp2-bf16", adapter, model=bf16),
        "zero3-bf16": starting(tiny, "zero3", tmp_path / "zero3-bf16", adapter, model=bf16),
    }
    ranked = [name for name in configs if name != "single"]
    results = run_ranks("support.trainer_workers:many_runs", 2, [(configs[name], None) for name in ranked], IDS)[0]
    seen = {"single": observe(configs["single"], IDS)} | dict(zip(ranked, results, strict=True))
    loss, start = first_loss(configs["single"], adapter), load_file(adapter / FILE)
    # Else a start that did nothing would pass, and one through bf16.
    assert abs(loss - first_loss(configs["single"], None)) > 1e-2
    assert not all(torch.equal(value.bfloat16().float(), value) for value in start.values())
    for name in configs:
        first = seen[name]["summary"]["train_loss_first"]
        assert first == pytest.approx(loss, abs=0.05 if "bf16" in name else 1e-5), name
        saved = load_file(tmp_path / name / "adapter" / FILE)
        assert saved.keys() == start.keys(), name
        for key, value in start.items():
            assert torch.allclose(saved[key], value, rtol=1e-7, atol=0), (name, key)
        said = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        assert {key: said[key] for key in ADAPTER if key != "target_modules"} == {
            key: value for key, value in ADAPTER.items() if key != "target_modules"
        }
        assert sorted(said["target_modules"]) == sorted(ADAPTER["target_modules"])
    used = json.loads((tmp_path / "zero3" / "run.json").read_text())["lora"]
    assert used["init_from"] == str(adapter) and used["rank_pattern"] == ADAPTER["rank_pattern"]
    assert f"| started from | the adapter `{adapter}` |" in (tmp_path / "zero3" / "adapter" / "README.md").read_text()
    # A run's record is read without the adapter that it started from.
    assert RunConfig.from_file(tmp_path / "zero3" / "run.json").lora.build().r == 6


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A change of what the file holds."""

    def apply(folder: Path) -> None:
        held = load_file(folder / FILE)
        change(held)
        save_file(held, folder / FILE)

    return apply


def said(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **values)


def other_rank(held: dict[str, Tensor]) -> None:
    held[f"{Q}.lora_A.weight"], held[f"{Q}.lora_B.weight"] = torch.ones(3, 48), torch.ones(48, 3)


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing key": (
        tensors(lambda held: held.pop(f"{Q}.lora_B.weight")),
        [FILE, f"'{Q}.lora_B.weight' is missing", '\'lora.target_modules\' is ["o_proj", "q_proj"]'],
    ),
    "extra key": (
        tensors(lambda held: held.update({Q.replace("1.", "7.") + ".lora_A.weight": torch.ones(4, 48)})),
        [FILE, "layers.7.self_attn.q_proj.lora_A.weight' belongs to nothing that the run adapts"],
    ),
    "wrong shape": (
        tensors(lambda held: held.update({f"{Q}.lora_A.weight": torch.ones(4, 47)})),
        [FILE, f"'{Q}.lora_A.weight' has shape (4, 47), expected (4, 48)", "another base model's"],
    ),
    "NaN": (
        tensors(lambda held: held[f"{Q}.lora_B.weight"][5].fill_(torch.nan)),
        [FILE, f"'{Q}.lora_B.weight' holds NaN"],
    ),
    "DoRA": (said(use_dora=True), ["adapter_config.json: 'use_dora' is True", "only plain LoRA can be started from"]),
    "DoRA unsaid": (
        tensors(lambda held: held.update({f"{Q}.lora_magnitude_vector": torch.ones(48)})),
        [f"'{Q}.lora_magnitude_vector' is DoRA's"],
    ),
    "rewritten base": (
        said(init_lora_weights="pissa_niter_4"),
        ["'init_lora_weights' is 'pissa_niter_4'", "base weights"],
    ),
    "rank mismatch": (tensors(other_rank), [f"'{Q}.lora_A.weight'", "its rank is 3, and 'lora.r'", "says 4"]),
    "rank contradicted": (said(r=2), ["'lora.r' is 4, but", "adapter_config.json", "says 2", "leave 'lora.r' out"]),
    "truncated": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8]),
        [FILE, "is truncated: its header describes"],
    ),
    "pickled": (
        lambda folder: (folder / FILE).rename(folder / "adapter_model.bin"),
        ["'lora.init_from' is", f"without {FILE} (adapter_model.bin is never loaded)"],
    ),
    "zeros of a pruned model": (
        said(sparse_base={"modules": ["model.layers.0.self_attn.q_proj"]}),
        ["adapter_config.json says 'sparse_base'", "'sparse_base.enabled'"],
    ),
    "not there": (shutil.rmtree, ["'lora.init_from' is", "does not exist", "a safetensors file"]),
}


@pytest.mark.parametrize(("damage", "words"), BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused_before_the_model_is_loaded(
    damage: Callable[[Path], Any], words: list[str], broken: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_loads(monkeypatch)
    damage(broken)
    says(refused("--lora.init_from", str(broken)), *words)


def test_a_resumed_run_goes_on_from_its_checkpoint(
    tiny: Tiny, plain: Path, broken: Path, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"init_from": str(plain)}
    train: dict[str, Any] = {"max_steps": 2, "save_steps": 1}
    whole = tiny.config("single", tmp_path / "whole", train=train, lora=lora, data={"eval": None})
    run(RunConfig.from_dict(whole))
    branch_off(tmp_path / "whole", tmp_path / "on", 1)
    on = {**whole, "train": {**whole["train"], "output_dir": str(tmp_path / "on"), "resume": True}}
    run(RunConfig.from_dict(on))
    first, second = (load_file(tmp_path / name / "adapter" / FILE) for name in ("whole", "on"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert not all(torch.equal(value, first[key]) for key, value in load_file(plain / FILE).items())

    never_loads(monkeypatch)
    words = ["--train.resume", str(tmp_path / "whole" / "checkpoint-1")]
    tensors(lambda held: held[f"{Q}.lora_B.weight"].mul_(1.001))(broken)
    says(refused(*words, "--lora.init_from", str(broken)), "other settings", 'lora.init_from is "an adapter, SHA-256')
    says(refused(*words, "--lora.target_modules", '["q_proj", "o_proj"]'), 'lora.init_from is null here, "an adapter')
