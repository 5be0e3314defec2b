"""The tiles of the indexed products: how a launcher chooses one, and how a kernel with it is compiled ahead."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from .variants import Variant

GROUP = 8
"""Rows of tiles that run side by side, so that they share the weight's tiles in L2."""
RANK_STEP = 16
"""Step of the sum over a low rank: the least that a matrix unit takes."""


class Tile(NamedTuple):
    """The block of results that one program computes, the step of its sum, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    cost: float = 1.0
    """Time per multiplication against the first tile's. An estimate, not measured."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def kind_of(dtype: torch.dtype, *, nf4: bool, ragged: bool = False, columns: bool = False) -> str:
    """Key of a table of tiles."""
    words = ["16" if dtype.itemsize == 2 else "32"]
    words += ["nf4"] if nf4 else []
    # fp32 products have the same tile for a ragged k.
    words += ["columns"] if columns else ["ragged"] if ragged and dtype.itemsize == 2 else []
    return " ".join(words)


def choose(tiles: tuple[Tile, ...], n: int, width: int, device: torch.device) -> Tile:
    """The tile that covers n × width results soonest: rounds of programs × a program's time."""
    processors = _multiprocessors(device)

    def time(tile: Tile) -> float:
        programs = triton.cdiv(n, tile.m) * triton.cdiv(width, tile.n)
        return triton.cdiv(programs, processors) * tile.m * tile.n * tile.cost

    return min(tiles, key=time)


def constants_of(tile: Tile, absent: tuple[str, ...]) -> dict[str, object]:
    """Constexpr parameters of a kernel with this tile, ``absent`` pointers included."""
    shape = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP}
    return {**shape, **dict.fromkeys(absent)}


_TYPES = {"rows": "*i64", "channels": "*i64", "absmax": "*fp32", "levels": "*fp32", "gate_absmax": "*fp32"}
_TYPES |= {"up_absmax": "*fp32"}
_MATRICES = ("weight", "gate", "up")


def variant(
    kernel: triton.JITFunction, kind: str, tile: Tile, constants: dict[str, object], unaligned: tuple[str, ...]
) -> Variant:
    """A kernel whose parameters are pointers up to ``out`` and integers after it, with one tile."""
    names = [name for name in kernel.arg_names if name not in constants]
    place = names.index("out") + 1
    element = "bf16" if kind.startswith("16") else "fp32"
    types = _TYPES | (dict.fromkeys(_MATRICES, "*u8") if "nf4" in kind else {})
    pointers = {name: types.get(name, f"*{element}") for name in names[:place]}
    words = [kernel.__name__.removesuffix("_kernel"), element, *kind.split()[1:], f"{tile.m}x{tile.n}x{tile.k}"]
    return Variant(
        kernel=kernel,
        label=" ".join(words),
        signature=pointers | dict.fromkeys(names[place:], "i32"),
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        matrix_units=element == "bf16",
        aligned=tuple(name for name in names if name not in unaligned),
    )
