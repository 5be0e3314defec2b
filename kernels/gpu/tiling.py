"""The tiles of the indexed products: how a launcher chooses one, and how a kernel with it is compiled ahead."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton

from ..choice import NF4_BYTES
from ..rates import key_of, rates_of
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
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def kind_of(dtype: torch.dtype, *, nf4: bool, ragged: bool = False) -> str:
    """Key of a table of tiles."""
    words = ["16" if dtype.itemsize == 2 else "32"]
    words += ["nf4"] if nf4 else []
    # fp32 products have the same tile for a ragged k.
    words += ["ragged"] if ragged and dtype.itemsize == 2 else []
    return " ".join(words)


@lru_cache(4096)  # Layers ask for the same again and again.
def _best(
    tiles: tuple[Tile, ...], kind: str, product: str, n: int, width: int, device: torch.device
) -> tuple[float, Tile]:
    """Seconds for each step of the sum, and the tile that takes them."""
    rates, processors = rates_of(device), multiprocessors(device)
    dtype, nf4 = (torch.bfloat16 if kind.startswith("16") else torch.float32), "nf4" in kind
    rate = rates[key_of(product, dtype, nf4=nf4)] / processors
    of_tokens = dtype.itemsize * (2 if product == "gradient" else 1)
    matrices = 2 if product in ("gated", "gradient") else 1
    of_matrices = matrices * (NF4_BYTES if nf4 else dtype.itemsize)

    def time(tile: Tile) -> float:
        programs = triton.cdiv(n, tile.m) * triton.cdiv(width, tile.n)
        compute = triton.cdiv(programs, processors) * 2 * matrices * tile.m * tile.n * tile.cost / rate
        return max(compute, programs * (tile.m * of_tokens + tile.n * of_matrices) / rates["l2"])

    tile = min(tiles, key=time)
    return time(tile), tile


def choose(
    tables: dict[str, tuple[Tile, ...]], kind: str, product: str, n: int, width: int, device: torch.device
) -> Tile:
    """The tile of a table that covers n × width results soonest, by the rates of the device (``product``: one's name there).

    The longer of two times counts, both for a step of the sum: the multiprocessors' rounds of programs, and what all
    programs together read through L2, their rows of tokens and of the matrices. Few channels make small tiles wait for
    the second: 6144 tokens by 144 channels of gate and up are 144 programs of 128 × 64 or 288 of 64 × 64, which read
    1.5 times as much.
    """
    tiles = tables[kind]
    return tiles[0] if len(tiles) == 1 else _best(tiles, kind, product, n, width, device)[1]


def predict(
    tables: dict[str, tuple[Tile, ...]],
    kind: str,
    product: str,
    n: int,
    width: int,
    summed: int,
    device: torch.device,
) -> float:
    """Seconds of the tile that :func:`choose` takes, for a sum over ``summed`` values."""
    seconds, tile = _best(tables[kind], kind, product, n, width, device)
    return seconds * triton.cdiv(summed, tile.k) * tile.k


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
