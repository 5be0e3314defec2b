"""Reference of ``kernels/floats.py``: the formulas, a value at a time."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..floats import E4M3, E4M3_OVER, E8M0


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; no infinity, NaN at both ends."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def e2m1(code: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)


def e8m0(code: int) -> float:
    """A power of two."""
    return 2.0 ** (code - 127) if code < 255 else float("nan")


def float_rows(
    rows: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    bits: int,
    scale: int,
    block: int,
    every: int,
    first: int = 0,
) -> Tensor:
    """See :func:`sparselora_kernels.float_rows`."""
    result = []
    for row in range(rows.shape[0]) if channels is None else channels.tolist():
        shared = row if every == 1 else (row + first) // every if every else 0
        data, codes, values = bytes(scales[shared].tolist()), rows[row].tolist(), []
        for position in range(length):
            number = position // block if block else 0
            if scale in (E4M3, E4M3_OVER):
                assert whole is not None
                (all_of_it,) = struct.unpack("<f", bytes(whole.flatten().tolist()))
                factor = torch.tensor(e4m3(data[number]))
                factor = factor / torch.tensor(all_of_it) if scale == E4M3_OVER else factor * torch.tensor(all_of_it)
            elif scale == E8M0:
                factor = torch.tensor(e8m0(data[number]))
            else:
                factor = torch.tensor(struct.unpack_from("<f", data, 4 * number)[0])
            code = codes[position] if bits == 8 else codes[position // 2] >> position % 2 * 4 & 15
            values.append(torch.tensor(e4m3(code) if bits == 8 else e2m1(code)) * factor)
        result.append(torch.stack(values))
    return torch.stack(result).to(dtype) if result else torch.empty(0, length, dtype=dtype)
