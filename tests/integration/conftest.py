"""A tiny model, its tokenizer and an instruction task on disk, and the run configs over them."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.harness import ROOT
from support.models import tiny_base

# DeepSpeed compiles an op by ninja, and again whenever it finds another ninja: always that of this environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Sparsity of the tiny model (3 layers, 104 neurons, 2 key/value heads of 8), all three groups.
LAYERS = {"ffn": {"1-2": 0.7}, "qk": {"1": 0.5}, "vo": {"2": 0.5}}
VOCABULARY = 260


@dataclass(frozen=True)
class Tiny:
    """Where the tiny model and its data are."""

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def train(self) -> str:
        return str(self.folder / "train.jsonl")

    @property
    def eval(self) -> str:
        return str(self.folder / "eval.jsonl")

    def config(self, engine: str, output_dir: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
        """A run of 6 steps of 8 rows (as 1 rank); keys of ``sections`` go over those of the same section."""
        ranks = 1 if engine == "single" else 2
        config: dict[str, Any] = {
            "model": {"name_or_path": self.model, "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8},
            # Kept for two steps, so that the checkpoints hold the masks.
            "sparse_lora": {"rank": 4, "start_step": 1, "layers": LAYERS, "interval": 2},
            "data": {"train": self.train, "eval": self.eval, "max_length": 48},
            "train": {
                "output_dir": str(output_dir),
                "max_steps": 6,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 4 // ranks,
                "gradient_accumulation_steps": 2,
                "warmup_ratio": 0.2,
                "save_steps": 2,
                "disable_tqdm": True,
            },
            "engine": {"name": engine},
        }
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **copy.deepcopy(values)}
        return config

    def config_file(self, path: Path, *args: Any, **sections: dict[str, Any]) -> str:
        """The same, as a file."""
        path.write_text(json.dumps(self.config(*args, **sections)), encoding="utf-8")
        return str(path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A pad token, bos, eos, and one id per byte."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=128
    )


def task_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts of 8 to 24 bytes; the answer repeats one of their letters."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = "".join(generator.choice("abcdef") for _ in range(generator.randint(2, 18)))
        rows.append({"prompt": f"say {letters}: ", "completion": letters[0] * 3 + generator.choice([".", "!!"])})
    return rows


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_base(vocab_size=VOCABULARY).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", task_rows(64, seed=0))
    write_rows(folder / "eval.jsonl", task_rows(10, seed=1))
    return Tiny(folder)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whatever tests before this one left in the environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path | str], list[dict[str, float]]]:
    """The training rows of a run's ``metrics.jsonl``."""

    def read(folder: Path | str) -> list[dict[str, float]]:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    return read


@pytest.fixture(scope="session")
def main() -> Callable[[], int]:
    """``main`` of ``launch/train.py``, which a subprocess test below runs for real."""
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def refused(
    tiny: Tiny, tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Launch a run that must be refused before its first step; what the user is told."""

    def launch(*argv: str, engine: str = "single", **sections: dict[str, Any]) -> str:
        sections["train"] = {"max_steps": 2, "save_steps": None, **sections.get("train", {})}
        config = tiny.config_file(tmp_path / "run.json", engine, tmp_path / "out", **sections)
        monkeypatch.setattr("sys.argv", ["train.py", "--config", config, *argv])
        # A message and a status, not a traceback.
        assert main() == 2, "the run was not refused"
        message = capsys.readouterr().err
        metrics = tmp_path / "out" / "metrics.jsonl"
        assert not metrics.exists() or '"loss"' not in metrics.read_text()
        assert not (tmp_path / "out" / "adapter").exists()
        return message

    return launch


@pytest.fixture(scope="session")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a checkpoint at its 2nd and last step."""
    from sparselora_dist.config.run import RunConfig
    from sparselora_dist.train import run

    folder = tmp_path_factory.mktemp("finished") / "out"
    run(RunConfig.from_dict(tiny.config("single", folder, train={"max_steps": 2})))
    return folder
