"""benchmarks/fp8_step.py on a tiny model: whole steps in fp8, by a stand-in for the GPU's product, near the decoded ones."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from support.fp8_product import fp8_products
from support.harness import ROOT


def test_a_step_in_fp8_is_near_the_decoded_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shape=tiny", "--layers=3", "--tokens=64", "--length=32", "--repeats=1"]
    monkeypatch.setattr(sys, "argv", ["fp8_step.py", "--json", *sizes])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with fp8_products() as product:
        runpy.run_path(str(ROOT / "benchmarks" / "fp8_step.py"), run_name="__main__")
    # Seven matrices of three layers, forward and back, two sides, in two turns and the check.
    assert product.call_count > 2 * 2 * 3 * 7 * 3
    sides = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sides"]
    assert sides.keys() == {"bf16", "fp8 decoded", "fp8", "fp8 decoded, sparse", "fp8, sparse"}
    assert sides["fp8 decoded"]["gradients"] < 0.03
    for name in ("fp8", "fp8, sparse"):
        assert 0.01 < sides[name]["gradients"] < 0.2
        assert sides[name]["held_gb"] < sides["bf16"]["held_gb"]
