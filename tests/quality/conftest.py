"""One tiny run, made once; and the tiny model, its tokenizer and its task of the integration tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.config import RunConfig
from support.harness import ROOT

from ..integration.conftest import alone, tiny  # noqa: F401


def run_data(folder: Path) -> dict[str, Any]:
    """A run of the embedded model in a few seconds."""
    return {
        "model": {"name_or_path": str(ROOT / "demo/model"), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "sparse_lora": {
            "layers": {"ffn": {"1-4": 0.9}, "qk": {"2-4": 0.5}, "vo": {"2-4": 0.5}},
            "start_step": 0.3,
        },
        "data": {
            "train": str(ROOT / "demo/data/train.jsonl"),
            "eval": str(ROOT / "demo/data/eval.jsonl"),
            "max_length": 192,
            "train_limit": 64,
            "eval_limit": 16,
        },
        "train": {
            "output_dir": str(folder),
            "max_steps": 6,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "eval_steps": 3,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a finished run."""
    from sparselora_dist.train import run

    folder = tmp_path_factory.mktemp("quality") / "tiny run"
    run(RunConfig.from_dict(run_data(folder)))
    assert (folder / "summary.json").is_file() and json.loads((folder / "run.json").read_text())
    return folder
