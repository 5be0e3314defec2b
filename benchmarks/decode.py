"""What does decoding a frozen matrix cost in each format, against NF4? How exact is it, and how large?

    python benchmarks/decode.py [--rows 1024] [--length 4096] [--repeats 9] [--threads 1] [--device cuda] [--json]

Normal weights, encoded by each codec; billm, which needs data, gets random codes and numbers, and no figure of exactness.
First a few rows of every format are checked against the plain formulas, bit for bit, and on a GPU the whole matrix against
the CPU. Then all formats take turns, ``--repeats`` times: all rows, and a kept quarter of them. Medians are printed, in
nanoseconds of processor time a value on a CPU and in GB/s of written values on a GPU, and as multiples of NF4's in the same
run; a ratio is the median of the turns' ratios, so that what else the machine does meets both sides. Encoding is timed once,
on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparselora_dist.codecs import Codec, codec_named
from sparselora_dist.codecs.levels import LevelsCodec
from sparselora_kernels import EncodedWeight, level_layout, reference
from sparselora_kernels.formats import FLOATS, LEVELS, NF4
from sparselora_kernels.levels import BILLM, groups, numbers, pack_params, widths
from sparselora_kernels.nf4 import absmax_map

# The repository keeps its root off sys.path, and with it the folder of the script.
sys.path.append(str(Path(__file__).resolve().parent))
from gpu_timing import timed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS: tuple[tuple[Any, int], ...] = (
    ("nf4", 4), ("fp8", 8), ("hqq", 4), ("hqq", 3), ("hqq", 2), ("bcq", 4), ("bcq", 3), ("bcq", 2), ("shiftadd", 3),
    ("billm", 2),
)  # fmt: skip


def encoded(codec: Codec, matrix: Tensor) -> EncodedWeight:
    """The matrix (C, length), stored; at random for billm."""
    if not (isinstance(codec, LevelsCodec) and codec.format == "billm"):
        return codec.whole(matrix)
    count, length = matrix.shape
    params = torch.randn(count, groups(length), numbers(BILLM, 2)) * 0.02
    codes, _, columns = widths(length, BILLM, 2)
    shapes = (count, codes), (1, columns)
    random = [torch.randint(256, shape, dtype=torch.uint8) for shape in shapes]
    return EncodedWeight([random[0], pack_params(params), random[1]], level_layout(length, BILLM, 2))


def plainly(weight: EncodedWeight, dtype: torch.dtype) -> Tensor:
    """By the formula of its format, a value at a time."""
    kind, length, *rest = weight.layout
    if kind == NF4:
        options = {"length": length, "double_quant": bool(rest[0]), "absmax_map": absmax_map(torch.device("cpu"))}
        return reference.nf4_rows(*weight.parts, None, dtype, **options)
    parts = [*weight.parts, *[None] * (3 - len(weight.parts))]
    if kind == LEVELS:
        return reference.level_rows(*parts, None, dtype, length=length, rule=rest[0], bits=rest[1])  # type: ignore[arg-type]
    assert kind == FLOATS
    names = dict(zip(("bits", "scale", "block", "every"), rest))
    return reference.float_rows(*parts, None, dtype, length=length, **names)  # type: ignore[arg-type]


def check(name: str, codec: Codec, dtype: torch.dtype) -> None:
    """Raises SystemExit unless a few rows are what the formulas say."""
    weight = encoded(codec, torch.randn(3, 300) * 0.02)
    if not torch.equal(weight.decode(None, dtype), plainly(weight, dtype)):
        raise SystemExit(f"{name}: decoded values are not those of the formula")


def sqnr(exact: Tensor, stored: Tensor) -> float:
    """10 log10 of signal over noise, dB."""
    noise = (exact.double() - stored.double()).square().sum()
    return 10 * math.log10(exact.double().square().sum() / noise)


def moved(weight: EncodedWeight, device: torch.device) -> EncodedWeight:
    return EncodedWeight([part.to(device) for part in weight.parts], weight.layout)


def spent(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds: of the processor on a CPU, because what others do on the machine is no part of it."""
    if device.type != "cpu":
        return timed(call, device, hide=True)
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """By format: bits a weight, SQNR, and seconds of both decodings with their ratios to NF4's."""
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    matrix = torch.randn(options.rows, options.length) * 0.02
    kept = torch.randperm(options.rows)[: options.rows // 4].sort().values.to(device)
    found: dict[str, dict[str, float | None]] = {}
    work: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {}
    for format, bits in FORMATS:
        codec = codec_named(format, bits)
        name = f"{format} {bits}"
        check(name, codec, dtype)
        started = time.process_time()
        weight = encoded(codec, matrix)
        made = time.process_time() - started
        on_cpu = weight.decode(None, torch.float32)
        there = moved(weight, device)
        if device.type != "cpu" and not torch.equal(there.decode(None, torch.float32).cpu(), on_cpu):
            raise SystemExit(f"{name}: the device decodes other values than the CPU")
        found[name] = {
            "bits": 8 * sum(part.nbytes for part in weight.parts) / matrix.numel(),
            "sqnr": None if format == "billm" else sqnr(matrix, on_cpu),
            "encode": None if format == "billm" else made,
        }
        work[name] = (lambda w=there: w.decode(None, dtype)), (lambda w=there: w.decode(kept, dtype))
    for index, side in enumerate(("all", "kept")):
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(options.repeats + 1):
            for name, calls in work.items():
                seconds = spent(calls[index], device)
                if turn:  # The first one compiles.
                    times[name].append(seconds)
        base = times["nf4 4"]
        for name, own in times.items():
            found[name][side] = median(own)
            found[name][f"{side}, times nf4"] = median(mine / nf4 for mine, nf4 in zip(own, base))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    if options.json:
        return print(json.dumps(rows))
    values = options.rows * options.length
    unit = "GB/s" if options.device == "cuda" else "ns a value"
    head = ["format", "bits a weight", "SQNR, dB", "encoding, ns a value"]
    for side in ("all rows", "a kept quarter"):
        head += [f"{side}, {unit}", "times NF4"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, row in rows.items():
        made = None if row["encode"] is None else 1e9 * row["encode"] / values
        cells = [name, f"{row['bits']:.3f}", *("" if x is None else f"{x:.2f}" for x in (row["sqnr"], made))]
        for side, count in (("all", values), ("kept", options.rows // 4 * options.length)):
            spent, ratio = row[side], row[f"{side}, times nf4"]
            assert spent is not None
            speed = (
                count * DTYPES[options.dtype].itemsize / spent / 1e9
                if options.device == "cuda"
                else 1e9 * spent / count
            )
            cells += [f"{speed:.2f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
