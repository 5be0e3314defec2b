"""The training loop spares the model its waits: the partition comes from the host, the masks are compared once a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.config import RunConfig
from sparselora_dist.layers import context
from sparselora_dist.train import run
from support.harness import ROOT


def settings(folder: Path, **sparse: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(ROOT / "demo/model"), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "sparse_lora": sparse,
        "data": {"train": str(ROOT / "demo/data/train.jsonl"), "max_length": 96, "train_limit": 16},
        "train": {
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }


@pytest.mark.parametrize("layers", [{"ffn": {"1-4": 0.9}}, {}], ids=["sparse", "dense"])
def test_the_partition_is_handed_over(layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    begin = context.SparseContext.begin

    def noted(self: context.SparseContext, labels: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, labels, *args, **kwargs)
        if labels is not None:
            modes.append(self.check_masks)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model made the partition itself")

    monkeypatch.setattr(context.SparseContext, "begin", noted)
    monkeypatch.setattr(context, "partition_tokens", refuse)
    summary = run(RunConfig.from_dict(settings(tmp_path / "run", layers=layers, enabled=bool(layers))))
    assert modes == ["caller"] * 4
    assert (summary["context_share"] > 0.3) is bool(layers)
    assert summary["executed_flops_share"] < 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_another_optimizer_continues_a_checkpoint_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """8-bit codes go through the files: the same optimizer goes on bit for bit, another from the decoded moments."""
    pytest.importorskip("bitsandbytes")

    def trained(name: str, optim: str, resume: bool | str = False) -> list[float]:
        data = settings(tmp_path / name, enabled=False)
        data["lora"]["r"] = 64
        data["train"] |= {"optim": optim, "resume": resume, "max_steps": 3, "save_steps": 2}
        run(RunConfig.from_dict(data))
        return [json.loads(row)["loss"] for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    start = str(tmp_path / "whole" / "checkpoint-2")
    whole = trained("whole", "adamw_8bit")
    state = json.loads((Path(start) / "state.json").read_text())
    assert state["optim"] == "adamw_8bit"
    with caplog.at_level("WARNING"):
        assert trained("same", "adamw_8bit", start)[-1] == whole[-1]
        assert not [record for record in caplog.records if "bit for bit" in record.getMessage()]
        files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "same")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert trained("decoded", "adamw_torch", start)[-1] == whole[-1]  # The loss ahead of the step.
        assert "run of 'adamw_8bit' on 'adamw_torch': its moments are decoded from 8 bits" in caplog.text
        trained("fp32", "adamw_torch")
        trained("coded", "adamw_8bit", str(tmp_path / "fp32" / "checkpoint-2"))
        assert "run of 'adamw_torch' on 'adamw_8bit': its moments are coded in 8 bits anew" in caplog.text
