"""``sparselora-dist inspect FOLDER --sparsity``: the zeros of a model, and whether all that were there still are."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from ..config.errors import ConfigError
from ..io.zeros import MatrixZeros, ModelZeros, mean_share, model_zeros
from ..method.channels import ATTENTION, FFN

WIDTH = 116
_PRUNED = 0.01  # A matrix with fewer zeros has no pattern to speak of.


def run(arguments: argparse.Namespace) -> int:
    """Print; 1 where a zero of ``--against`` was lost, else 0.

    Raises:
        ConfigError: an argument that has no meaning here.
        ValueError, OSError: see :func:`model_zeros`.
    """
    for key in ("config", "data", "ranks", "output"):
        if getattr(arguments, key) is not None:
            raise ConfigError(f"'--{key}' has no meaning with --sparsity, which looks at weights only: leave it out")
    found = model_zeros(arguments.target, arguments.against)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)
    if found.lost:
        worst = max(found.matrices, key=lambda matrix: matrix.lost or 0)
        print(
            f"error: {found.lost} positions are zero in {found.against} and not in {found.folder} (most in {worst.name}: "
            f"{worst.lost}): an adapter was merged without its mask, or weights were trained",
            file=sys.stderr,
        )
    return 1 if found.lost else 0


def _print(found: ModelZeros) -> None:
    layers = found.layers
    names = list(dict.fromkeys(_short(matrix) for layer in layers.values() for matrix in layer))
    order = (*ATTENTION, *FFN)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    heads = [name.removesuffix("_proj")[:12] for name in names]
    widths = [max(7, len(head) + 1) for head in heads]
    while sum(widths) > WIDTH - 22:
        heads, widths, names = heads[:-1], widths[:-1], names[:-1]
    print(f"{found.folder}: zeros of its matrices, %; pattern: N kept of every M")
    print(f"{'layer':<6}{'all':>7}{'pattern':>9}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths)))
    for number, layer in layers.items():
        cells = [[matrix for matrix in layer if _short(matrix) == name] for name in names]
        shares = "".join(f"{_percent(cell):>{width}}" for cell, width in zip(cells, widths))
        print(f"{number:<6}{_percent(layer):>7}{_pattern(layer):>9}{shares}")
    print(f"{'mean':<6}{100 * found.share:>7.2f}")
    if outside := [matrix for matrix in found.matrices if matrix.layer is None]:
        print("in no layer: " + ", ".join(f"{matrix.name} {_percent([matrix])}" for matrix in outside))
    if found.pruning:
        print(textwrap.fill(_record(found), WIDTH))
    if found.against:
        zeros = sum(m.zeros + m.lost - m.gained for m in found.matrices if m.lost is not None and m.gained is not None)
        gained = sum(matrix.gained or 0 for matrix in found.matrices)
        print(f"against {found.against}: of {zeros} zeros there, {found.lost} are none here; {gained} are new")


def _short(matrix: MatrixZeros) -> str:
    """The last part of a matrix' name: the column that it is in, with other experts' of its layer."""
    return matrix.in_layer.rpartition(".")[2]


def _percent(matrices: list[MatrixZeros]) -> str:
    return f"{100 * mean_share(matrices):.2f}" if matrices else "-"


def _pattern(layer: list[MatrixZeros]) -> str:
    """What all pruned matrices of a layer have."""
    found = {matrix.pattern for matrix in layer if matrix.share >= _PRUNED}
    return (found.pop() or "-") if len(found) == 1 else "-" if not found else "mixed"


def _record(found: ModelZeros) -> str:
    asked = found.pruning or {}
    text = f"pruning.json: {asked.get('method')} {asked.get('pattern')} of {asked.get('model')}"
    if asked.get("data"):
        text += f", calibrated on {asked['data']} (tokens' SHA-256 {str(asked.get('tokens'))[:16]})"
    known = [matrix for matrix in found.matrices if matrix.recorded is not None]
    if less := [matrix for matrix in known if matrix.short_of_record]:
        text += f"; fewer zeros than it records in {len(less)} of {len(known)} matrices, first {less[0].name}: "
        return text + f"{less[0].share:.4%}, recorded {less[0].recorded:.4%}"
    return f"{text}; all {len(known)} matrices have the zeros that it records"
