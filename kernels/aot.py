"""Compile every Triton kernel for every target, without a GPU: ``python -m sparselora_kernels.aot``.

One line per variant and target: registers a thread, bytes spilled a thread, shared memory and its limit, and the matrix
instruction found. The exit status is 1, and the variant is named, if

- it does not compile;
- it spills registers;
- it needs more shared memory than the target gives a block;
- ptxas runs its wgmma one after another (warnings C7510 and C7511), which costs most of their speed and nothing else shows;
- its products must run on the matrix units (``matrix_units``) and the PTX has none of the target's instructions.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gpu
from .gpu.variants import Variant

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Targets, and the most shared memory of a block, bytes (CUDA programming guide, compute capabilities)."""
MATRIX_INSTRUCTIONS = {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05.mma",)}
SMALL_TILE = "mma.sync"
"""What sm_90 and sm_100 use where the tile is too small for their own instruction (fewer than 64 rows)."""
SERIALISED = re.compile(r"\((C751[01])\)")
"""ptxas' warnings that the wgmma of a kernel wait for each other."""
HELPERS = ("activations", "estimate", "indexing", "matrix", "tiles", "tiling", "variants")
"""Modules of ``gpu/`` that hold no kernel."""
PROCESSES = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant on one target."""

    module: str
    label: str
    arch: int
    registers: int = 0
    spills: int = 0
    """Bytes a thread."""
    shared: int = 0
    """Bytes a block."""
    matrix: str = ""
    """The matrix instruction found."""
    problems: list[str] = field(default_factory=list)


def modules() -> list[str]:
    """Import names of the modules of ``gpu/`` that hold kernels."""
    return [f"{gpu.__name__}.{found.name}" for found in pkgutil.iter_modules(gpu.__path__) if found.name not in HELPERS]


def variants(module: str) -> list[Variant]:
    """The variants of a module.

    Raises:
        ValueError: it has none, two have one label, or a function named ``*_kernel`` has no variant.
    """
    holder: ModuleType = importlib.import_module(module)
    if not hasattr(holder, "variants"):
        raise ValueError(f"{module} has no variants(); if it holds no kernel, add it to HELPERS")
    found: list[Variant] = list(holder.variants())
    labels = [variant.label for variant in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{module}: several variants are called {', '.join(twice)}")
    compiled = {variant.kernel.fn.__name__ for variant in found}
    functions = {name: getattr(value, "fn", None) for name, value in vars(holder).items() if name.endswith("_kernel")}
    own = {name for name, function in functions.items() if getattr(function, "__module__", None) == module}
    if forgotten := sorted(own - compiled):
        raise ValueError(f"{module}: no variant of {', '.join(forgotten)}")
    return found


def examine(module: str, variant: Variant, arch: int) -> Compiled:
    """Compile one variant for one target and look at what came out."""
    kernel = variant.kernel
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    try:
        source = ASTSource(kernel, signature, constexprs=dict(variant.constants), attrs=attributes)
        with ptxas_log() as log:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = compiled.asm["ptx"]
        registers, spills = resources(compiled.asm["cubin"])
    except Exception as error:  # A compiler's failures have no common type.
        lines = [line for line in str(error).splitlines() if line.strip()]
        words = f"does not compile: {type(error).__name__}: {' | '.join(lines[-3:])[:500]}"
        return Compiled(module, variant.label, arch, problems=[words])
    shared, problems = compiled.metadata.shared, serialised(log.getvalue())
    matrix = next((name for name in (*MATRIX_INSTRUCTIONS[arch], SMALL_TILE) if name in ptx), "")
    if spills:
        problems.append(f"spills {spills} bytes")
    if shared > SHARED_MEMORY[arch]:
        problems.append(f"needs {shared} bytes of shared memory, sm_{arch} has {SHARED_MEMORY[arch]}")
    if variant.matrix_units and not matrix:
        problems.append(f"its product uses no matrix instruction ({', '.join(MATRIX_INSTRUCTIONS[arch])})")
    return Compiled(module, variant.label, arch, registers, spills, shared, matrix, problems)


@contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says of the kernels that are compiled meanwhile. They are compiled anew: from Triton's cache it says
    nothing. Triton prints it."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        yield log


def serialised(log: str) -> list[str]:
    """The problem that a log of ptxas names, if it does."""
    codes = sorted(set(SERIALISED.findall(log)))
    return [f"its wgmma are serialised ({', '.join(codes)})"] if codes else []


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, which holds spilled registers and in these kernels nothing else."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    if len(figures) != 3:
        raise RuntimeError(f"cuobjdump's report is not understood: {report[-300:]}")
    return int(figures["REG"]), int(figures["STACK"]) + int(figures["LOCAL"])


def _task(task: tuple[str, int, int]) -> Compiled:
    """In a worker process: a variant by its place, because kernels cannot be pickled."""
    module, place, arch = task
    return examine(module, variants(module)[place], arch)


def compile_all(names: Sequence[str], archs: Sequence[int], only: str = "") -> Iterator[Compiled]:
    """Every variant of the modules whose ``"<file>: <label>"`` contains ``only``, on every target, in order."""
    tasks = [
        (module, place, arch)
        for module in names
        for place, variant in enumerate(variants(module))
        if only in f"{_file(module)}: {variant.label}"
        for arch in archs
    ]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_task, tasks)


def _file(module: str) -> str:
    return module.rpartition(".")[2]


def _line(found: Compiled) -> str:
    name = f"{_file(found.module)}: {found.label}"
    limit = SHARED_MEMORY[found.arch]
    note = found.matrix
    if found.matrix == SMALL_TILE and SMALL_TILE not in MATRIX_INSTRUCTIONS[found.arch]:
        note += " (small tile)"
    verdict = "; ".join(found.problems) or "ok"
    return (
        f"{name:<48} sm_{found.arch:<4} {found.registers:>5} {found.spills:>6} {found.shared:>7} {limit:>7}  "
        f"{note:<22} {verdict}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sparselora_kernels.aot", description="Compile every Triton kernel ahead.")
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED_MEMORY), help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help='variants whose "file: label" contains this')
    parser.add_argument("--module", action="append", metavar="NAME", help="modules to compile; default: all of gpu/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 2
    print(f"{'kernel':<48} {'target':<7} {'regs':>5} {'spill':>6} {'shared':>7} {'limit':>7}  {'matrix':<22} verdict")
    done = []
    for found in compile_all(options.module or modules(), options.arch or list(SHARED_MEMORY), options.only):
        print(_line(found), flush=True)
        done.append(found)
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in done], indent=1) + "\n")
    bad = [found for found in done if found.problems]
    for found in bad:
        print(f"{_file(found.module)}: {found.label}, sm_{found.arch}: {'; '.join(found.problems)}", file=sys.stderr)
    if not done:
        print("nothing to compile", file=sys.stderr)
    print(f"{len(done) - len(bad)} of {len(done)} passed")
    return 1 if bad or not done else 0


if __name__ == "__main__":
    sys.exit(main())
