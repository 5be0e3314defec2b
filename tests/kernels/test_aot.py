"""Every kernel compiles for every target without a spill, within its shared memory and without serialised products; what
does not is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparselora_kernels import aot

BAD = """
import triton
import triton.language as tl
from sparselora_kernels.gpu.variants import Variant

@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros((M, M), dtype=tl.float32)
    for step in range(8):
        x = tl.load(a + step * M * K + i[:, None] * K + k[None, :])
        y = tl.load(b + step * M * K + k[:, None] * M + i[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(out + i[:, None] * M + i[None, :], acc)

@triton.jit
def sort_kernel(x, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i, mask=i < n, other=0.0)
    for step in range(n):
        values += tl.sum(values, 0)
    tl.store(x + i, values, mask=i < n)

@triton.jit
def broken_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.no_such_function(SIZE))

def product(label, dtype, m, k, stages, precision="ieee"):
    return Variant(
        kernel=product_kernel, label=label, signature={"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"},
        constants={"M": m, "K": k, "PRECISION": precision}, num_warps=8, num_stages=stages, matrix_units=True,
        aligned=("a", "b", "out"),
    )

def variants():
    yield product("good", "bf16", 64, 32, 2)
    yield product("small", "bf16", 16, 32, 2)
    yield product("crowded", "bf16", 256, 32, 2)  # As many sums as registers.
    yield product("vast", "bf16", 128, 128, 5)
    yield product("slow", "fp32", 32, 32, 1)
    yield Variant(kernel=sort_kernel, label="spilling", signature={"x": "*fp32", "n": "i32"},
                  constants={"SIZE": 8192}, num_warps=1)
    yield Variant(kernel=broken_kernel, label="broken", signature={"x": "*fp32"}, constants={"SIZE": 16})
"""
FORGETFUL = BAD.replace('    yield product("good"', '    return\n    yield product("good"')


def compiler(arguments: list[str], folder: Path | None = None, interpret: str | None = None) -> Any:
    """The command, outside the interpreter that the other tests use: (finished process, figures by label)."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "sparselora_kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1100)


@pytest.mark.timeout(1200)  # About a minute on two cores that do nothing else.
@pytest.mark.parametrize("arch", aot.SHARED_MEMORY)
def test_every_kernel_compiles(arch: int, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    finished = compiler(["--arch", str(arch), "--json", str(figures)])
    assert finished.returncode == 0, finished.stderr[-3000:]
    done = json.loads(figures.read_text())
    assert {found["module"] for found in done} == set(aot.modules())
    for found in done:
        assert found["registers"] > 0 and not found["problems"]
        assert found["shared"] <= aot.SHARED_MEMORY[arch] and not found["spills"]
    # Scores have tiles of 64 tokens: large enough for the target's own matrix instruction.
    scores = [found for found in done if found["label"].startswith("score") and "fp32" not in found["label"]]
    assert scores and {found["matrix"] for found in scores} == set(aot.MATRIX_INSTRUCTIONS[arch])


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(BAD)
    figures = tmp_path / "figures.json"
    finished = compiler(["--arch", "90", "--module", "bad_kernels", "--json", str(figures)], tmp_path)
    assert finished.returncode == 1
    done = {found["label"]: found for found in json.loads(figures.read_text())}
    assert done["good"]["matrix"] == "wgmma" and done["small"]["matrix"] == "mma.sync"
    assert "small tile" in finished.stdout
    reasons = {
        "crowded": "wgmma are serialised (C7511)",
        "vast": "of shared memory",
        "slow": "no matrix instruction",
        "spilling": "spills",
        "broken": "not compile",
    }
    for label, found in done.items():
        assert len(found["problems"]) == (2 if label == "crowded" else label in reasons), label
        if label in reasons:
            assert reasons[label] in found["problems"][0]
            assert f"bad_kernels: {label}, sm_90: " in finished.stderr


def test_a_kernel_without_a_variant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "forgetful_kernels.py").write_text(FORGETFUL)
    finished = compiler(["--module", "forgetful_kernels"], tmp_path)
    assert finished.returncode != 0
    assert "no variant of broken_kernel, product_kernel, sort_kernel" in finished.stderr


def test_nothing_compiled_is_no_success() -> None:
    finished = compiler(["--only", "no such kernel"])
    assert finished.returncode == 1 and "nothing to compile" in finished.stderr
    finished = compiler([], interpret="1")
    assert finished.returncode == 2 and "TRITON_INTERPRET" in finished.stderr
