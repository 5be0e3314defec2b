"""``train.use_liger_kernel``: which patch is called and how, and what is refused. A stand-in package takes Liger's place."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselora_dist.apply import build, liger
from sparselora_dist.config import ConfigError, RunConfig

RUN = {
    "model": {"name_or_path": "org/model"},
    "data": {"train": "train.jsonl"},
    "train": {"output_dir": "runs/x", "use_liger_kernel": True},
}
STAND_IN = """
calls = []
MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **options: calls.append(options)}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, bool]]]:
    """The options that the stand-in's patch for Llama was called with; there is a GPU."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "monkey_patch.py").write_text(STAND_IN)
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from liger_kernel.transformers import monkey_patch

    yield monkey_patch.calls
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def test_norm_and_rope_and_nothing_else(calls: list[dict[str, bool]]) -> None:
    liger.use_liger("llama")
    off = dict.fromkeys(("swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    assert calls == [{"rope": True, "rms_norm": True, **off}]


def test_a_run_patches_before_its_model_is_built(calls: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_model", lambda section: SimpleNamespace(model_type="llama"))
    patched_at_load: list[int] = []

    def load_base(*_: Any, **__: Any) -> None:
        patched_at_load.append(len(calls))
        raise InterruptedError

    monkeypatch.setattr(build, "load_base", load_base)
    placement: Any = None
    for wanted in (True, False):
        data = copy.deepcopy(RUN)
        data["train"]["use_liger_kernel"] = wanted
        with pytest.raises(InterruptedError):
            build.build_model(RunConfig.from_dict(data), placement)
    assert patched_at_load == [1, 1] and len(calls) == 1


def test_a_family_without_a_patch(calls: list[dict[str, bool]]) -> None:
    with pytest.raises(ConfigError, match=r"'train.use_liger_kernel'.*no patch for 'qwen9'.*false"):
        liger.use_liger("qwen9")
    assert calls == []


def test_without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'train.use_liger_kernel'.*pip install 'sparselora-dist\[liger\]'"):
        liger.use_liger("llama")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'train.use_liger_kernel'.*no GPU"):
        liger.use_liger("llama")


def test_a_run_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = importlib.import_module("sparselora_dist.train.run")  # The package's ``run`` is the function.
    monkeypatch.setattr(run, "check_model", lambda section: SimpleNamespace(model_type="llama"))
    engine: Any = SimpleNamespace(is_main=True)
    with pytest.raises(ConfigError, match=r"'train.use_liger_kernel'"):
        run._run(RunConfig.from_dict(RUN), engine, run.StopSignals(tmp_path))
