"""What the indexed products take: a stored matrix, plain or NF4, and what they check before a launch."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)
"""Those that the indexed products are compiled in."""


class NF4Matrix(NamedTuple):
    """A (C, length) matrix of 4-bit codes, decoded inside the product, bit for bit as if decoded first.

    ``value = levels[code] · absmax``, in fp32, rounded once to the dtype of the product.
    """

    codes: Tensor
    """(C, 32·nb) uint8, nb = ceil(length / 64): two values a byte, the first in the high half."""
    absmax: Tensor
    """fp32, (k, nb) of the chosen channels in their order, or (C, nb) where all are."""
    levels: Tensor
    """(16,) fp32."""
    length: int
    """Values per row."""


Matrix: TypeAlias = "Tensor | NF4Matrix"


def unpack(weight: Matrix, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Data, absmax and levels (``None`` for a plain matrix), and values per row.

    Raises:
        ValueError: a dtype of ``x`` that has no kernel, or a plain weight of another one.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"no indexed product in {x.dtype}: bfloat16 or float32")
    if isinstance(weight, NF4Matrix):
        return unit_stride(weight.codes), unit_stride(weight.absmax), weight.levels, weight.length
    if weight.dtype != x.dtype:
        raise ValueError(f"the weight is {weight.dtype}, x is {x.dtype}: the indexed products take one dtype")
    return unit_stride(weight), None, None, weight.shape[1]


def unpack_pair(
    gate: Matrix, up: Matrix, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, int]:
    """Data and absmax of gate and of up, levels, and values per row.

    Raises:
        ValueError: one is NF4 and the other is not, or they differ in size.
    """
    gate_data, gate_absmax, levels, length = unpack(gate, x)
    up_data, up_absmax, _, up_length = unpack(up, x)
    if isinstance(gate, NF4Matrix) != isinstance(up, NF4Matrix):
        raise ValueError("gate and up are stored alike: both plain or both NF4")
    if (gate_data.shape, length) != (up_data.shape, up_length):
        raise ValueError(f"gate is {gate_data.shape[0]} x {length}, up is {up_data.shape[0]} x {up_length}")
    return gate_data, gate_absmax, up_data, up_absmax, levels, length


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with its rows contiguous; they may lie apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def factors(low: Tensor | None, b: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """The factors of a low-rank product and its rank; ``x``, which is not read, and 0 where there is none.

    Raises:
        ValueError: one without the other, or of another dtype than ``x``.
    """
    if low is None and b is None:
        return x, x, 0
    if low is None or b is None:
        raise ValueError("low and b go together: the product low · bᵀ")
    if not low.dtype == b.dtype == x.dtype:
        raise ValueError(f"low is {low.dtype}, b is {b.dtype}, x is {x.dtype}: the indexed products take one dtype")
    return unit_stride(low), unit_stride(b), low.shape[1]


def check_rows(out: Tensor) -> None:
    """Raises ValueError: the rows of ``out``, which is written in place, are not contiguous."""
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"the rows of out must be contiguous, its strides are {out.stride()}")


def any_index(rows: Tensor | None, channels: Tensor | None, x: Tensor) -> Tensor:
    """What stands in an absent list's place, where no kernel reads it: the other list, an allocation only without one."""
    other = rows if channels is None else channels
    return x.new_empty(1, dtype=torch.int64) if other is None else other


def count_of(index: Tensor | None, otherwise: int) -> int:
    return otherwise if index is None else index.shape[0]


def stride_of(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)
