"""A small model in each format of the frozen weights, streamed into an engine and trained."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from sparselora_dist.config import QuantizationSection, RunConfig
from sparselora_dist.io.manifest import tensors_sha256
from sparselora_dist.quantizing.quantize import quantize

from .agreement_workers import follow
from .engine_parts import close, run_config
from .models import ALL_LINEAR, tiny_base
from .nf4_workers import SHAPE, gathered, stream
from .quantizing_workers import asked_of, model_folder
from .sharding_workers import held
from .small_floats import write_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8"},
    "hqq 3": {"format": "hqq", "bits": 3},
    "bcq 2": {"format": "bcq", "bits": 2},
    "shiftadd 3": {"format": "shiftadd"},
    "billm": {"format": "billm"},
    "nvfp4": {"format": "nvfp4"},
    "fp8 in blocks": {"format": "fp8"},
}
"""All but the last three are made when the model is loaded."""


def _plain(folder: Path) -> None:
    tiny_base(**SHAPE).save_pretrained(folder)


def _billm(folder: Path) -> None:
    asked = asked_of("billm", model_folder(folder / "plain", **SHAPE, num_hidden_layers=3), folder / "billm")
    with mock.patch.object(dist, "is_initialized", lambda: False):  # One rank makes it, alone.
        quantize(asked)
    for file in asked.output.iterdir():
        file.rename(folder / file.name)


def _files(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_checkpoint(folder, kind, **SHAPE, num_hidden_layers=3)

    return write


MAKERS: dict[str, Callable[[Path], None]] = {
    "billm": _billm,
    "nvfp4": _files("modelopt nvfp4"),
    "fp8 in blocks": _files("fine-grained"),
}
"""Of the checkpoints that hold a format already."""


@cache
def base_folder(case: str) -> str:
    """Of the model that a case loads, the same on all ranks."""
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    if not dist.is_initialized() or dist.get_rank() == 0:
        MAKERS.get(case, _plain)(Path(folder[0]))
    if dist.is_initialized():
        dist.barrier()
    return folder[0]


def config_of(name: str, case: str) -> RunConfig:
    folder = base_folder(case if case in MAKERS else "plain")
    return replace(run_config(name, folder=folder), quantization=QuantizationSection(**CASES[case]))


def formats(name: str) -> dict[str, Any]:
    """By case: whole parts before and after training, what this rank holds, and the run."""
    seen: dict[str, Any] = {}
    for case in CASES:
        engine, model = stream(config_of(name, case), targets=ALL_LINEAR)
        start, here = gathered(model), held(model)
        run = follow(engine, model)
        seen[case] = {"start": start, "held": here, "run": run, "after": gathered(model)}
        close(engine)
    return seen


def loaded(names: list[str]) -> dict[tuple[str, str], tuple[str, int]]:
    """By engine and case, of what nobody trains: the hash of its whole parts, and the bytes that are here."""
    seen = {}
    for name, case in itertools.product(names, CASES):
        engine, model = stream(config_of(name, case), sparse=False)
        whole = gathered(model)
        parts = {part.rpartition(".")[2] for part in whole}
        here = sum(one["local"] for part, one in held(model).items() if part.rpartition(".")[2] in parts)
        seen[name, case] = tensors_sha256(whole), here
        close(engine)
    return seen
