"""The commands of the page of TRL's DPO and GRPO trainers, as they stand there, in one process."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.trainer_pages import PAGES, blocks, clone, commands

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_page_s_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    (command,) = (found for found in commands("preference.md") if found.name == name)
    assert command.launcher == ("python",)
    monkeypatch.chdir(clone(tmp_path, rows=48))
    monkeypatch.setattr(sys, "argv", list(command.script))
    runpy.run_path(command.script[0], run_name="__main__")

    folder = tmp_path / "runs" / name
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [row for row in state["log_history"] if "loss" in row]
    assert [row["sparsity/active"] for row in logged] == [0, 1, 1, 1]
    assert logged[-1]["sparsity/context_share"] > 0.5
    if name == "dpo":
        assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    else:
        assert logged[0]["kl"] == pytest.approx(0, abs=1e-5)
        assert all(row["grad_norm"] > 0 for row in logged), "it learns"
    assert len(load_file(folder / "adapter_model.safetensors")) == 40


def test_every_page_s_commands_are_run() -> None:
    """By the test that names the page."""
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    pages = {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    assert len(pages) >= 6
    for page in pages:
        assert blocks(page) and any(f'"{page}"' in text for text in tests), page
