"""What a device reaches in each kind of product and copy: by these numbers launchers choose, and a benchmark measures them.

The defaults are those of an H200, by which the rule of :mod:`.choice` was right for all but a few of 182 measured pairs of
products (docs/performance.md). ``benchmarks/gpu.py`` writes a file for the device that it runs on. Names:

    vendor 16, vendor 32                       the vendor's GEMM, FLOP/s, in bf16 and in fp32
    nt, nn, gated, gradient  16, 32, 16 nf4    our products, FLOP/s
    memory, copy, l2                           streaming; rows by index, read and written; L2 to the multiprocessors, bytes/s
    launch                                     seconds of the device between two small kernels

Only choices depend on them, never results beyond the rounding of one product or another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

VARIABLE = "SPARSELORA_KERNEL_RATES"
"""Names a file of rates, whatever the device."""
PRODUCTS = ("nt", "nn", "gated", "gradient")
"""Of :mod:`.gpu.indexed_linear`, and forward and input gradient of the gated FFN."""

DEFAULTS: Mapping[str, float] = {
    # Large products reach 800 there, those of a layer about 700; fp32 by the data sheet.
    "vendor 16": 720e12,
    "vendor 32": 50e12,
    # Full tiles of 128 x 128 and 128 x 256 by wgmma, without TMA or specialised warps.
    **{f"{product} 16": 450e12 for product in PRODUCTS},
    # Every tile of tokens decodes its rows again, outside the matrix units.
    **{f"{product} 16 nf4": 200e12 for product in PRODUCTS},
    # IEEE fp32 has no matrix unit, and keeps its operands in registers. Not measured.
    **{f"{product} 32": 20e12 for product in PRODUCTS},
    **{f"{product} 32 nf4": 20e12 for product in PRODUCTS},
    # A large copy; 3.0 on an H100.
    "memory": 4.2e12,
    # Rows of 8 KiB by index, read and put back: 3.4 where they are only read.
    "copy": 2.2e12,
    # Published measurements of H100: 5.5 to 6 TB/s.
    "l2": 5.5e12,
    "launch": 3e-6,
}


class RatesError(ValueError):
    """A file of rates that cannot be used."""


def path_of(device_name: str) -> Path:
    """Where a device's file lies: ``$SPARSELORA_KERNEL_RATES``, or its name beside the cached factors."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    root = Path(os.environ.get("SPARSELORA_CACHE") or Path.home() / ".cache" / "sparselora_dist")
    return root / "kernel_rates" / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def read(file: Path) -> dict[str, float]:
    """The rates of a file, completed by the defaults.

    Raises:
        RatesError: it cannot be read, names an unknown rate, or gives one that is no positive number.
    """
    try:
        found = json.loads(file.read_text())["rates"]
        wrong = [name for name, rate in found.items() if name not in DEFAULTS or not 0 < float(rate) < float("inf")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatesError(
            f"{file}: no rates of kernels ({error}); remove it, or write it with benchmarks/gpu.py"
        ) from error
    if wrong:
        raise RatesError(f"{file}: {', '.join(wrong)}: unknown, or no positive number; known: {', '.join(DEFAULTS)}")
    return {**DEFAULTS, **{name: float(rate) for name, rate in found.items()}}


def write(file: Path, device_name: str, rates: Mapping[str, float]) -> None:
    """A file that :func:`read` takes; ``rates`` are those that were measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"device": device_name, "rates": dict(rates)}, indent=1) + "\n")


@cache
def rates_of(device: torch.device) -> Mapping[str, float]:
    """The rates to choose by on a device: its file's, where there is one."""
    named = VARIABLE in os.environ
    if device.type != "cuda" and not named:
        return DEFAULTS
    file = path_of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return read(file) if named or file.is_file() else DEFAULTS


def key_of(product: str, dtype: torch.dtype, *, nf4: bool = False) -> str:
    """Name of a product's rate."""
    return f"{product} {'16' if dtype.itemsize == 2 else '32'}{' nf4' if nf4 else ''}"
