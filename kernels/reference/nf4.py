"""Reference of ``kernels/nf4.py``: the two formulas, a value at a time."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

# QLoRA, appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_rows(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    double_quant: bool,
    absmax_map: Tensor,
) -> Tensor:
    """See :func:`sparselora_kernels.nf4_rows`; ``absmax_map`` (256,) is the 8-bit map."""
    count = -(-length // 64)
    result = []
    for row in range(codes.shape[0]) if channels is None else channels.tolist():
        data, packed, values = bytes(scales[row].tolist()), codes[row].tolist(), []
        for position in range(length):
            block = position // 64
            if double_quant:
                slot = (row * count + block) // 256 - row * count // 256
                (nested,) = struct.unpack_from("<f", data, count + 4 * slot)
                (offset,) = struct.unpack_from("<f", data, len(data) - 4)
                absmax = absmax_map[data[block]] * torch.tensor(nested) + torch.tensor(offset)
            else:
                absmax = torch.tensor(struct.unpack_from("<f", data, 4 * block)[0])
            byte = packed[position // 2]
            values.append(torch.tensor(LEVELS[byte & 15 if position % 2 else byte >> 4]) * absmax)
        result.append(torch.stack(values))
    return torch.stack(result).to(dtype) if result else torch.empty(0, length, dtype=dtype)
