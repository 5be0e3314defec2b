"""How exact is NF4 storage, and what does encoding cost?

    python benchmarks/nf4.py [--model FOLDER] [--json]

Normal weights of several shapes, and every matrix of a model's decoder layers if one is given. First checks that the
decoded values equal bitsandbytes' bit for bit. Then prints the signal-to-quantisation-noise ratio (SQNR, dB, higher is
better) with and without double quantisation, that of ``down`` and ``o`` of a checkpoint that bitsandbytes has quantised
already (they are decoded and encoded again in the other direction), and the time of encoding as a ratio to bitsandbytes'.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from sparselora_dist.codecs import NF4Codec

SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024), (512, 14336))


def sqnr(exact: Tensor, stored: Tensor) -> float:
    """10 log10 of signal over noise, dB."""
    noise = (exact.double() - stored.double()).square().sum()
    return 10 * math.log10(exact.double().square().sum() / noise)


def theirs(matrix: Tensor) -> Tensor:
    """bitsandbytes' round trip."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"))


def seconds(call: Any, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def measure(matrix: Tensor) -> dict[str, float]:
    """One matrix (out, in), rows a multiple of 64 both ways."""
    double, single = NF4Codec(), NF4Codec(double_quant=False)
    if not torch.equal(double.roundtrip(matrix), theirs(matrix)):
        raise SystemExit(f"{tuple(matrix.shape)}: not what bitsandbytes makes of it")
    turned = double.roundtrip(theirs(matrix).t().contiguous()).t()
    ours = seconds(lambda: double.encode(matrix, 0))
    reference = seconds(lambda: bnb.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"))
    return {
        "double": sqnr(matrix, double.roundtrip(matrix)),
        "single": sqnr(matrix, single.roundtrip(matrix)),
        "again, turned": sqnr(matrix, turned),
        "encoding, times faster": reference / ours,
    }


def model_matrices(folder: str) -> dict[str, Tensor]:
    """The seven kinds of matrices of all decoder layers, each kind as one matrix."""
    from sparselora_dist.io.shard_files import TensorFiles
    from sparselora_dist.method.channels import ATTENTION, FFN

    files = TensorFiles.of_model(Path(folder))
    kinds = {
        kind: [files.get(name) for name in files.tensors if name.endswith(f"{kind}.weight")]
        for kind in (*ATTENTION, *FFN)
    }
    return {kind: torch.cat(found).contiguous() for kind, found in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    matrices = {f"normal {rows} x {length}": (torch.randn(rows, length) * 0.02).bfloat16() for rows, length in SHAPES}
    if options.model:
        matrices |= model_matrices(options.model)
    rows = {name: measure(matrix) for name, matrix in matrices.items()}
    if options.json:
        return print(json.dumps(rows))
    columns = list(next(iter(rows.values())))
    print(f"| matrix | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.2f}' for column in columns)} |")


if __name__ == "__main__":
    main()
