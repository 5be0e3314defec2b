"""Every launch at the shapes of Llama 3 8B and 70B compiles under Triton's own JIT, without a spill and within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparselora_kernels import aot

LIBRARY = Path(__file__).parents[1] / "lib"

# What the interpreter computes, and the list of variants may compile: a stride of one is a number of the compiler's to
# Triton, not a tensor; and four operands of 64 KiB each.
BROKEN = """
import torch
import triton
import triton.language as tl

@triton.jit
def strided_kernel(x, out, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i * stride.to(tl.int64)))

@triton.jit
def vast_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros((M, M), dtype=tl.float32)
    for step in range(8):
        x = tl.load(a + step * M * K + i[:, None] * K + k[None, :])
        y = tl.load(b + step * M * K + k[:, None] * M + i[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(out + i[:, None] * M + i[None, :], acc)

@triton.jit
def sort_kernel(x, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    values = tl.load(x + i, mask=i < n, other=0.0)
    for step in range(n):
        values += tl.sum(values, 0)
    tl.store(x + i, values, mask=i < n)

def empty(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

def strided(stride):
    x = empty(64, stride)
    strided_kernel[(1,)](x, empty(64), x.stride(0), SIZE=64)

def vast():
    vast_kernel[(1,)](empty(1024, 128), empty(1024, 128), empty(128, 128).float(), M=128, K=128, num_warps=8, num_stages=5)

def cases():
    yield "stride two", lambda: strided(2)
    yield "stride one", lambda: strided(1)
    yield "vast", vast
    yield "spilling", lambda: sort_kernel[(1,)](empty(8192).float(), 8191, SIZE=8192, num_warps=1)
"""


def launch(arch: int, folder: Path, module: str | None = None) -> dict[str, Any]:
    """Binaries of all cases, or of a module's, in a process without the interpreter that the other tests use."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(folder), str(LIBRARY), env.get("PYTHONPATH")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, places)), "TRITON_CACHE_DIR": str(folder / "cache")}
    figures = folder / "figures.json"
    command = [sys.executable, "-P", "-m", "support.jit_launches", "--arch", str(arch), "--json", str(figures)]
    command += ["--module", module] if module else []
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1100)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


@pytest.mark.timeout(1200)  # About 40 seconds on two cores that do nothing else.
@pytest.mark.parametrize("arch", aot.SHARED_MEMORY)
def test_every_launch_compiles(arch: int, tmp_path: Path) -> None:
    found = launch(arch, tmp_path)
    for binary in found["binaries"]:
        assert not binary["problems"], binary
        assert binary["registers"] > 0
    kernels = {variant.kernel.fn.__name__ for module in aot.modules() for variant in aot.variants(module)}
    assert {binary["kernel"] for binary in found["binaries"]} == kernels, "no case launches the others"
    assert found["launches"] > 10 * len(found["binaries"]), "compiled once each, not at every launch"


def test_what_breaks_a_launch_is_found(tmp_path: Path) -> None:
    (tmp_path / "broken_launches.py").write_text(BROKEN)
    found = launch(90, tmp_path, "broken_launches")["binaries"]
    problems = {binary["case"]: " ".join(binary["problems"]) for binary in found}
    reasons = {"stride two": "", "stride one": "CompilationError", "vast": "shared memory", "spilling": "spills"}
    assert problems.keys() == reasons.keys()
    for case, reason in reasons.items():
        assert reason in problems[case] and bool(reason) == bool(problems[case]), (case, problems[case])
