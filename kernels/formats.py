"""The encodings of a frozen matrix: which numbers say how it is stored, and who decodes it.

A layout is a list of numbers, so that it can be an argument of a registered operator: the kind, the values per row, and what
the kind needs besides. Every part has the channel as dim 0, or one row for several channels in a line
(:attr:`Format.every`): a scale of 16 channels, a mask that all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import use_fp8
from .floats import E4M3, E4M3_OVER, FP32, float_rows
from .level_rows import level_rows
from .levels import BILLM, BITS
from .nf4 import nf4_rows

PLAIN: tuple[int, ...] = (0,)
"""The layout of one tensor of values."""
NF4 = 1
"""Kind of a layout ``(NF4, length, double_quant)``: :mod:`sparselora_kernels.nf4`."""
LEVELS = 2
"""Kind of a layout ``(LEVELS, length, rule, bits)``: :mod:`sparselora_kernels.levels`."""
FLOATS = 3
"""Kind of a layout ``(FLOATS, length, bits, scale, block, every, compute)``: :mod:`sparselora_kernels.floats`. The last is 1
where a device that multiplies fp8 is to do so: :mod:`sparselora_kernels.fp8`."""


class Format(NamedTuple):
    """An encoding."""

    numbers: int
    """How many a layout has."""
    decode: Callable[[Sequence[Tensor], Sequence[int], Tensor | None, torch.dtype, int], Tensor]
    """From parts, layout, channels (k,) int64 or None for all, dtype, and the number of the parts' first row in the matrix:
    the values (k, length). Parts whose ``every`` is not 1 are whole, and are found by that number."""
    every: Callable[[Sequence[int]], tuple[int, ...]]
    """How many channels share a row of each part; 0 where all of them do."""


def _nf4(
    parts: Sequence[Tensor], layout: Sequence[int], channels: Tensor | None, dtype: torch.dtype, first: int
) -> Tensor:
    codes, scales = parts
    _, length, double_quant = layout
    return nf4_rows(codes, scales, channels, dtype, length=length, double_quant=bool(double_quant), first=first)


def _levels(
    parts: Sequence[Tensor], layout: Sequence[int], channels: Tensor | None, dtype: torch.dtype, first: int
) -> Tensor:
    codes, params = parts[:2]
    columns = parts[2] if len(parts) == 3 else None
    _, length, rule, bits = layout
    return level_rows(codes, params, columns, channels, dtype, length=length, rule=rule, bits=bits)


def _floats(
    parts: Sequence[Tensor], layout: Sequence[int], channels: Tensor | None, dtype: torch.dtype, first: int
) -> Tensor:
    rows, scales, *whole = parts
    _, length, bits, scale, block, every, _ = layout
    return float_rows(
        rows, scales, whole[0] if whole else None, channels, dtype,
        length=length, bits=bits, scale=scale, block=block, every=every, first=first,
    )  # fmt: skip


def _floats_every(layout: Sequence[int]) -> tuple[int, ...]:
    _, _, _, scale, _, every, _ = layout
    return (1, every, 0) if scale in (E4M3, E4M3_OVER) else (1, every)


FORMATS: Mapping[int, Format] = {
    NF4: Format(3, _nf4, lambda layout: (1, 1)),
    LEVELS: Format(4, _levels, lambda layout: (1, 1, 0) if layout[2] == BILLM else (1, 1)),
    FLOATS: Format(7, _floats, _floats_every),
}
"""By kind."""


def numbers_of(layout: Sequence[int]) -> int:
    """How many numbers of ``layout``, from its first on, say how a matrix is stored."""
    return len(PLAIN) if layout[0] == PLAIN[0] else FORMATS[layout[0]].numbers


def every_of(layout: Sequence[int]) -> tuple[int, ...]:
    """How many channels share a row of each part; 0 where all do."""
    return (1,) if layout[0] == PLAIN[0] else FORMATS[layout[0]].every(layout)


def multiplies(layout: Sequence[int], part: Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix, of which this is a part, is multiplied as it is stored by operands in ``dtype``, not decoded: by
    :mod:`sparselora_kernels.fp8`."""
    if layout[0] != FLOATS or dtype is not torch.bfloat16:
        return False
    _, _, bits, scale, block, every, compute = layout
    along = block == 0 or (block == 1 and every == 0)
    return bool(compute) and bits == 8 and scale == FP32 and along and use_fp8(part)


def nf4_layout(length: int, double_quant: bool) -> tuple[int, ...]:
    """Layout of ``(codes, scales)`` as :mod:`sparselora_kernels.nf4` describes them."""
    return NF4, length, int(double_quant)


def level_layout(length: int, rule: int, bits: int) -> tuple[int, ...]:
    """Layout of ``(codes, params)``, or of ``(codes, params, columns)``, as :mod:`sparselora_kernels.levels` describes
    them.

    Raises:
        ValueError: the rule has no codes of so many bits.
    """
    if bits not in BITS[rule]:
        raise ValueError(f"rule {rule} has codes of {', '.join(map(str, BITS[rule]))} bits, not of {bits}")
    return LEVELS, length, rule, bits


def float_layout(length: int, bits: int, scale: int, block: int, every: int, compute: bool = False) -> tuple[int, ...]:
    """Layout of ``(rows, scales)`` or ``(rows, scales, whole)`` as :mod:`sparselora_kernels.floats` describes them."""
    return FLOATS, length, bits, scale, block, every, int(compute)
