"""Reference of ``kernels/level_rows.py``: the three rules, a value at a time."""

from __future__ import annotations

import struct

import torch
from torch import Tensor


def level_rows(
    codes: Tensor,
    params: Tensor,
    columns: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    *,
    length: int,
    rule: int,
    bits: int,
) -> Tensor:
    """See :func:`sparselora_kernels.level_rows`."""
    count = (2, bits, 7)[rule]
    result = []
    for row in range(codes.shape[0]) if channels is None else channels.tolist():
        planes, data, values = codes[row].tolist(), bytes(params[row].tolist()), []
        for position in range(length):
            group, j = divmod(position, 128)
            code = [planes[(group * bits + plane) * 16 + j // 8] >> j % 8 & 1 for plane in range(bits)]
            found = struct.unpack_from(f"<{count}e", data, group * count * 2)
            numbers = [torch.tensor(number, dtype=torch.float32) for number in found]
            if rule == 0:
                scale, zero = numbers
                value = (sum(bit << plane for plane, bit in enumerate(code)) - zero) * scale
            elif rule == 1:
                value = plus(code[0], numbers[0])
                for bit, number in zip(code[1:], numbers[1:]):
                    value = value + plus(bit, number)
            else:
                assert columns is not None
                if columns[0, position // 8] >> j % 8 & 1:
                    value = (numbers[4] + plus(code[0], numbers[5])) + plus(code[1], numbers[6])
                else:
                    value = numbers[2 * code[0]] + plus(code[1], numbers[2 * code[0] + 1])
            values.append(value)
        result.append(torch.stack(values))
    return torch.stack(result).to(dtype) if result else torch.empty(0, length, dtype=dtype)


def plus(bit: int, number: Tensor) -> Tensor:
    """The number with the sign of a bit."""
    return number if bit else -number
