"""Every launch of the public operations at real shapes, compiled by Triton's own JIT for a GPU that is not there.

    python -m support.jit_launches --arch 90 --json FILE

A driver takes the GPU's place: it answers for the target, looks at each binary instead of loading it, and launches
nothing. Tensors are torch's meta tensors, which have sizes, strides and alignment and no memory. What is compiled is
thus what a step would compile: Triton's specialisation on ones, on divisibility by 16 and on 64-bit numbers included,
which neither the interpreter nor the list of ``variants()`` shows.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import sparselora_kernels as kernels
import sparselora_kernels.score as scores
from sparselora_kernels import aot, fp8, indexed_linear
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.floats import E4M3, E4M3_OVER, E8M0, FP32, row_bytes
from sparselora_kernels.floats import scale_bytes as scale_bytes_of
from sparselora_kernels.gpu import tiling
from sparselora_kernels.levels import BILLM, SIGNS, widths
from sparselora_kernels.nf4 import blocks, scale_bytes
from sparselora_kernels.stored import unpack

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and B200; tiles are chosen by them."""
TOKENS = (2048, 8192)
CONTEXT = 0.75
RANKS = (None, 8, 32)
STORED = ("bf16", "fp32", "nf4")
"""How the frozen matrices are stored; tokens are fp32 beside fp32 and bf16 beside the others."""


@dataclass(frozen=True, slots=True)
class Model:
    """Sides of a layer's matrices, and the rows of each that the published configurations keep."""

    hidden: int
    width: int
    kv: int

    @property
    def neurons(self) -> int:
        return kernels.kept_count(self.width, 0.99)

    def attention(self, rows: int) -> int:
        """Kept rows of q, k, v or o, of ``rows``; a channel owns as many of each head, and two of q and k."""
        return kernels.kept_count(self.kv, 0.75) * rows // self.kv


MODELS = {"8b": Model(4096, 14336, 1024), "70b": Model(8192, 28672, 1024)}


@dataclass(slots=True)
class Binary:
    """What a launch asked for and no launch before it, or why there is none."""

    kernel: str
    case: str
    registers: int = 0
    shared: int = 0
    problems: list[str] = field(default_factory=list)


class NoDevice:
    """What Triton asks of the driver of one device of a target, which is not there. ``log`` is what ptxas says."""

    def __init__(self, arch: int, log: io.StringIO) -> None:
        self.arch, self.case, self.launches = arch, "", 0
        self.found: list[Binary] = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: self._launch
        self._log = log

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": aot.SHARED_MEMORY[self.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        registers, spills = aot.resources(binary)
        problems = aot.serialised(self._log.getvalue())
        self._log.seek(0)
        self._log.truncate()
        if spills:
            problems.append(f"spills {spills} bytes")
        self.found.append(Binary(name, self.case, registers, shared, problems))
        return 1, 1, registers, spills, 1024

    def unload_module(self, module: int) -> None:
        pass

    def _launch(self, *_: Any) -> None:
        self.launches += 1


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trained)


def index(count: int) -> Tensor:
    return empty(count, dtype=torch.int64)


def matrix(rows: int, length: int, stored: str) -> kernels.Weight:
    if stored != "nf4":
        return empty(rows, length, dtype=dtype_of(stored))
    codes = empty(rows, blocks(length) * 32, dtype=torch.uint8)
    scales = empty(rows, scale_bytes(length, True), dtype=torch.uint8)
    return kernels.EncodedWeight((codes, scales), kernels.nf4_layout(length, True))


def few_levels(rows: int, length: int, rule: int, bits: int) -> kernels.EncodedWeight:
    sizes = zip((rows, rows, 1), widths(length, rule, bits))
    return kernels.EncodedWeight(
        [empty(*size, dtype=torch.uint8) for size in sizes], kernels.level_layout(length, rule, bits)
    )


def small_floats(rows: int, length: int, bits: int, scale: int, block: int, every: int) -> kernels.EncodedWeight:
    count = -(-rows // every) if every else 1
    sizes = [(rows, row_bytes(length, bits)), (count, scale_bytes_of(length, scale, block)), (1, 4)]
    return kernels.EncodedWeight(
        [empty(*size, dtype=torch.uint8) for size in sizes[: 3 if scale in (E4M3, E4M3_OVER) else 2]],
        kernels.float_layout(length, bits, scale, block, every),
    )


FLOATS = [
    (8, FP32, 0, 1), (8, FP32, 1, 0), (8, E8M0, 32, 1), (8, E8M0, 1, 32), (4, E4M3, 16, 1), (4, E4M3, 1, 16),
    (4, E4M3_OVER, 16, 1), (4, E4M3_OVER, 1, 16), (4, E8M0, 32, 1), (4, E8M0, 1, 32),
]  # fmt: skip


def dtype_of(stored: str) -> torch.dtype:
    return torch.float32 if stored == "fp32" else torch.bfloat16


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def run_ffn(model: Model, stored: str, rank: int | None, tokens: int, dense: int) -> None:
    """Score, selection, gate and up, down, and back."""
    dtype, context = dtype_of(stored), int(tokens * CONTEXT)
    x = empty(tokens, model.hidden, dtype=dtype, trained=True)
    rows = index(context)
    factors = [(empty(8, model.hidden, dtype=dtype), empty(model.width, 8, dtype=dtype)) for _ in range(2)]
    score = kernels.gated_ffn_score(x, rows, *factors, "silu")
    channels = kernels.select_channels(score, model.neurons)
    lists = index(dense), rows, channels
    gate, up, down = (matrix(model.width, model.hidden, stored) for _ in range(3))
    updates: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    if rank is not None:
        for side in ("gate", "up"):
            updates[f"{side}_low"] = empty(tokens, rank, dtype=dtype, trained=True)
            updates[f"{side}_b"] = empty(model.width, rank, dtype=dtype, trained=True)
        last = {"low_dense": empty(dense, rank, dtype=dtype), "low_context": empty(context, rank, dtype=dtype)}
        last["b"] = empty(model.hidden, rank, dtype=dtype, trained=True)
    hidden = kernels.gated_up(x, gate, up, *lists, activation="silu", **updates)
    backward(kernels.ffn_down(*hidden, down, *lists, tokens, **last))


def run_attention(model: Model, stored: str, rank: int | None, tokens: int, dense: int) -> None:
    """Scores of q, k and v, selection, and the four projections, and back."""
    dtype, context = dtype_of(stored), int(tokens * CONTEXT)
    x = empty(tokens, model.hidden, dtype=dtype, trained=True)
    rows, outs = index(context), (model.hidden, model.kv, model.kv)
    factors = [(empty(8, model.hidden, dtype=dtype), empty(out, 8, dtype=dtype)) for out in outs]
    for score in kernels.projection_scores(x, rows, factors):
        kernels.select_channels(score, model.attention(score.shape[0]))
    for out, transposed in ((model.hidden, False), (model.kv, False), (model.hidden, True)):
        weight = matrix(out, model.hidden, stored)
        branch = () if rank is None else (empty(rank, model.hidden, dtype=dtype, trained=True),
                                          empty(out, rank, dtype=dtype, trained=True))  # fmt: skip
        lists = {"dense_rows": index(dense), "context_rows": rows, "channels": index(model.attention(out))}
        backward(kernels.lora_linear(x, weight, None, *branch, transposed=transposed, **lists))


def run_masked(model: Model, stored: str, rank: int | None, tokens: int, dense: int) -> None:
    """A projection and an FFN's two ends under a pruned matrix' mask, and back."""
    if rank is None:
        return
    dtype, context = dtype_of(stored), int(tokens * CONTEXT)
    lists = index(dense), index(context), index(model.neurons)
    a, b = (empty(*shape, dtype=dtype, trained=True) for shape in ((rank, model.hidden), (model.width, rank)))
    x, weight = empty(tokens, model.hidden, dtype=dtype, trained=True), matrix(model.width, model.hidden, stored)
    names = dict(zip(("dense_rows", "context_rows", "channels"), lists))
    backward(kernels.masked_linear(x, weight, a, b, 2.0, **names))
    backward(kernels.masked_up(x, weight, a, b, 2.0, *lists))


def run_decode(model: Model, stored: str, rank: int | None, tokens: int, dense: int) -> None:
    """All rows, as for dense tokens, and kept rows alone; what fp8 products need besides."""
    if stored == "nf4":
        shape = model.width, model.hidden
        floats = [small_floats(*shape, *form) for form in FLOATS]
        for weight in (matrix(*shape, stored), few_levels(*shape, SIGNS, 3), few_levels(*shape, BILLM, 2), *floats):
            for channels in (None, index(model.neurons)):
                for dtype in (torch.bfloat16, torch.float32):
                    unpack(weight).decode(channels, dtype)
        for dtype in (torch.bfloat16, torch.float32):
            for factors in (None, empty(model.hidden, dtype=torch.float32)):
                fp8.round_rows(empty(tokens, model.hidden, dtype=dtype), factors)
        for rows in (model.width, model.neurons):
            fp8.operand(empty(rows, model.hidden, dtype=torch.uint8).t())


RUNS: dict[str, Callable[..., None]] = {
    "ffn": run_ffn,
    "attention": run_attention,
    "masked": run_masked,
    "decode": run_decode,
}


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """All runs, each with its name; without dense tokens NF4 is decoded inside the products."""
    for model, stored, rank, tokens in product(MODELS, STORED, RANKS, TOKENS):
        for dense, (name, run) in product((tokens - int(tokens * CONTEXT), 0), RUNS.items()):
            what = f"{name} {model} {stored} rank {rank}, {tokens} tokens, {dense} dense"
            yield what, lambda run=run, args=(MODELS[model], stored, rank, tokens, dense): run(*args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, required=True, choices=list(aot.SHARED_MEMORY))
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--module", metavar="NAME", help="whose cases() are run instead of those here")
    options = parser.parse_args()
    tiling.multiprocessors = lambda device: MULTIPROCESSORS[options.arch]
    indexed_linear.prefers_vendor = lambda *_, **__: False  # Whatever the rates: all that could be launched.
    scores._without_autocast = lambda x: nullcontext()  # torch has none for meta tensors, and none is on.
    with aot.ptxas_log() as log, forced_triton():
        driver = NoDevice(options.arch, log)
        triton.runtime.driver.set_active(driver)
        for what, run in importlib.import_module(options.module).cases() if options.module else cases():
            driver.case = what
            try:
                run()
            except Exception as error:  # A compiler's failures have no common type.
                words = f"{type(error).__name__}: {str(error)[-500:]}"
                driver.found.append(Binary("", what, problems=[words]))
    found = {"launches": driver.launches, "binaries": [asdict(binary) for binary in driver.found]}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
