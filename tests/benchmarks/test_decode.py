"""benchmarks/decode.py on a small matrix: every format is checked, and has its bits, its noise and its times."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from support.harness import ROOT


def test_every_format_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["decode.py", "--json", "--rows=64", "--length=512", "--repeats=1"])
    runpy.run_path(str(ROOT / "benchmarks" / "decode.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(found) == 10
    bits = {
        "bcq 2": 2.25,
        "bcq 3": 3.375,
        "bcq 4": 4.5,
        "shiftadd 3": 3.375,
        "hqq 2": 2.25,
        "hqq 3": 3.25,
        "hqq 4": 4.25,
    }
    bits |= {"billm 2": 2.875 + 1 / 64, "fp8 8": 8 + 32 / 512}
    for name, row in found.items():
        assert row["bits"] == bits.get(name, row["bits"]), name
        assert (row["sqnr"] is None) == (name == "billm 2") and min(row["all"], row["kept"]) > 0
    assert found["nf4 4"]["all, times nf4"] == 1
    assert found["fp8 8"]["sqnr"] > found["nf4 4"]["sqnr"] > found["bcq 4"]["sqnr"] > found["bcq 3"]["sqnr"]
