"""benchmarks/masked_step.py on a tiny model: it checks the gradients first, and memory says what the docs say."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from support.harness import ROOT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_step_keeps_no_more_than_a_plain_one(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--hidden=512", "--width=512", "--layers=1", "--rows=2", "--length=32", "--vocabulary=64", "--repeats=1"]
    monkeypatch.setattr(sys, "argv", ["masked_step.py", "--json", "--threads=1", f"--dtype={dtype}", *sizes])
    runpy.run_path(str(ROOT / "benchmarks" / "masked_step.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["tokens"] == 64
    for side in ("exact", "straight_through"):
        assert found["sides"][side]["saved"] <= 1
        assert found["sides"][side]["peak_matrices"] <= 1.3, (
            "one matrix, and a quarter of this small one that is looked at"
        )
    assert found["sides"]["naive"]["saved"] > 1, "the comparison can tell"
