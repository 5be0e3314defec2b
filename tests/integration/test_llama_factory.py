"""The command of the LLaMA-Factory page, as it stands there: its script, its YAML, its data set's description."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from support.stand_ins import run_exp
from support.trainer_pages import clone, commands

pytestmark = pytest.mark.usefixtures("alone")


def test_the_page_s_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = commands("llama_factory.md")
    assert command.launcher == ("python",)
    modules = {name: ModuleType(name) for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner")}
    modules["llamafactory.train.tuner"].run_exp = run_exp  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(clone(tmp_path, rows=48))
    monkeypatch.setattr(sys, "argv", list(command.script))
    runpy.run_path(command.script[0], run_name="__main__")

    folder = tmp_path / "runs" / "llama_factory"
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [row for row in state["log_history"] if "loss" in row]
    assert [row["sparsity/active"] for row in logged] == [0] + [1] * 5
    assert logged[-1]["sparsity/context_share"] > 0.5
    assert len(load_file(folder / "adapter_model.safetensors")) == 40
    assert "SparseLoRACallback" in state["stateful_callbacks"]
