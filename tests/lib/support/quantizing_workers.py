"""Quantising on ranks: a small model with the demo's tokens, in several formats; one of them stopped on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from sparselora_dist.config import LoraSection
from sparselora_dist.layerwise.growing import GrowingModel
from sparselora_dist.quantizing.quantize import Quantizing, quantize

from .harness import ROOT
from .models import tiny_base

DATA = ROOT / "demo" / "data" / "train.jsonl"
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
"""Rows that 128 does not divide, several blocks of inputs in both orientations."""
CASES: dict[str, dict[str, Any]] = {
    "billm": {"format": "billm", "data": str(DATA)},
    "bcq 3 diagonal": {"format": "bcq", "bits": 3, "data": str(DATA), "compensate": "diagonal"},
    "hqq 3": {"format": "hqq", "bits": 3, "data": str(DATA)},
    "shiftadd": {"format": "shiftadd"},
    "fp8": {"format": "fp8", "data": str(DATA)},
}
LOFTQ: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    "init_lora_weights": "loftq",
    "loftq_config": {"loftq_iter": 2},
}
"""The adapter that starts over some of them."""
STARTED, STOPPED = "billm loftq", "billm stopped"
"""The latter is begun as the former."""
CASES[STARTED] = CASES["billm"] | {"loftq": LoraSection.from_dict(LOFTQ)}


def model_folder(folder: Path, **shape: Any) -> Path:
    """The model that is quantised, with a tokenizer."""
    tiny_base(**SHAPE | shape).save_pretrained(folder)
    for file in (ROOT / "demo" / "model").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def asked_of(case: str, model: Path, output: Path) -> Quantizing:
    return Quantizing(model=str(model), output=output, sequences=6, length=48, **CASES[case])


class StopError(Exception):
    pass


def begin(asked: Quantizing) -> None:
    """Stop after the first layer."""
    add = GrowingModel.add

    def first(self: GrowingModel, number: int, *args: Any) -> None:
        add(self, number, *args)
        raise StopError

    with mock.patch.object(GrowingModel, "add", first):
        try:
            quantize(asked)
        except StopError:
            return
    raise AssertionError("it was not stopped")


def quantized_files(model: str, folder: str, cases: list[str], stop: bool) -> None:
    """Each case in a folder of its name; ``stop``: begin what is gone on with elsewhere."""
    for case in cases:
        quantize(asked_of(STARTED if case == STOPPED else case, Path(model), Path(folder) / case))
    if stop:
        begin(asked_of(STARTED, Path(model), Path(folder) / STOPPED))
