"""Prune, fine-tune, merge: what a run on a pruned model saves says so, and the merged model has every zero that it had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselora_dist.cli import main
from support.compare import assert_close
from support.merging import load, logits, tensors
from support.pruned import keep

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("alone")
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "base"
    shutil.copytree(tiny.model, folder)
    found = load_file(folder / "model.safetensors")
    for name, value in found.items():
        if ".layers." in name and value.dim() == 2:
            found[name] = (value * keep(value, "2:4")).contiguous()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_from_a_pruned_model_to_a_merged_one(
    pruned: Path, tiny: Tiny, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.quality import subject
    from sparselora_dist.train import run

    sections: dict[str, Any] = {
        "model": {"name_or_path": str(pruned)},
        "lora": {"target_modules": TARGETS},
        "sparse_base": {"enabled": True},
        "train": {"max_steps": 3, "save_steps": 2},
        "data": {"eval": None},
    }
    summary = run(RunConfig.from_dict(tiny.config("single", tmp_path / "out", **sections)))
    modules = sorted(
        f"model.layers.{layer}.{path}"
        for layer in range(3)
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    )
    for adapter in (Path(summary["adapter"]), tmp_path / "out" / "checkpoint-2" / "adapter"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["sparse_base"] == {"modules": modules}, adapter
    card = (Path(summary["adapter"]) / "README.md").read_text()
    assert "under the zeros of a pruned base model, in 12 matrices" in card and "AutoPeftModel" not in card
    merged = tmp_path / "merged"
    words = ["merge", "--base", str(pruned), "--adapter", summary["adapter"], "--output", str(merged)]
    assert main([*words, "--dtype", "float32"]) == 0
    assert main(["inspect", str(merged), "--sparsity", "--against", str(pruned), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert seen["lost"] == 0 and {m["pattern"] for m in seen["matrices"] if m["layer"] is not None} == {"2:4"}
    before, after = tensors(pruned), tensors(merged)
    assert all(not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in modules)

    # What inspect measures is the model that was trained, not base plus adapter.
    measured, observe = [], subject.observe
    monkeypatch.setattr(
        subject, "observe", lambda model, *rest: measured.append(logits(model)) or observe(model, *rest)
    )
    assert main(["inspect", str(tmp_path / "out"), "--rows", "8", "--json"]) == 0
    assert_close("logits", logits(load(merged)), measured[0], rtol=1e-4, atol=1e-4)
    found = json.loads(capsys.readouterr().out)
    assert found["groups"]["ffn"]["adapted_recall"] is not None and found["groups"]["qk"]["recall"]["exact"] == 1
