"""Rows of a matrix of few levels as values; rules and layout in :mod:`.levels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .levels import GROUP, HQQ, PLANE, SIGNS, bit_table, groups, joined, numbers, spread, unpack_bits, unpack_params
from .operator import register

# Values that the CPU decodes at once: their fp32 forms stay in the L2 cache.
_CHUNK = 1 << 16


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
    """Decode ``channels`` of a matrix of few levels. Carries no gradient.

    Args:
        codes, params: uint8, laid out as there, of C channels.
        columns: uint8, for BILLM; otherwise ``None``.
        channels: (k,) int64 rows of these, or ``None`` for all.
        dtype: of the result.
        length: values per row.
        rule, bits: what a code means.

    Returns:
        (k, length).
    """
    return _run(codes, params, columns, channels, dtype, length, rule, bits)


def _level_rows(
    codes: Tensor,
    params: Tensor,
    columns: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    length: int,
    rule: int,
    bits: int,
) -> Tensor:
    if use_triton(codes):
        from .gpu import level_rows as triton_rows

        if dtype not in triton_rows.DTYPES:
            return _level_rows(codes, params, columns, channels, torch.float32, length, rule, bits).to(dtype)
        with torch.cuda.device_of(codes):
            return triton_rows.level_rows(codes, params, columns, channels, dtype, length=length, rule=rule, bits=bits)
    rows = codes.shape[0] if channels is None else channels.shape[0]
    out = codes.new_empty((rows, length), dtype=dtype)
    step = max(_CHUNK // (groups(length) * GROUP), 1)
    salient = None if columns is None else unpack_bits(columns).view(1, -1, GROUP)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        chosen = part if channels is None else channels[part]
        values = _values(codes[chosen], unpack_params(params[chosen], numbers(rule, bits)), salient, rule, bits)
        out[part] = values.view(values.shape[0], values.shape[1] * GROUP)[:, :length]
    return out


def _values(planes: Tensor, params: Tensor, salient: Tensor | None, rule: int, bits: int) -> Tensor:
    """(n, nb, 128) fp32, from a row's bytes, its numbers (n, nb, p) fp32, and its salient columns (1, nb, 128) bool."""
    n, nb, _ = params.shape
    planes = planes.reshape(-1, bits, PLANE)
    if rule == HQQ:
        scale, zero = params.split(1, -1)
        return joined(planes, bits).float().view(n, nb, GROUP).sub_(zero).mul_(scale)
    if rule == SIGNS:
        signs = spread(planes, bit_table(planes.device, True)).float().view(n, nb, bits, GROUP)
        values = signs[:, :, 0] * params[..., :1]
        for i in range(1, bits):
            # A product with a sign is exact, so that the sum is rounded once, fused or not.
            values.addcmul_(signs[:, :, i], params[..., i : i + 1])
        return values
    assert salient is not None
    mu_inner, a_inner, mu_outer, a_outer, mu, first, second = params.split(1, -1)
    plane = spread(planes[:, 0], bit_table(planes.device, False)).view(torch.bool).view(n, nb, GROUP)
    sign = spread(planes[:, 1], bit_table(planes.device, True)).float().view(n, nb, GROUP)
    middle = torch.where(salient, torch.where(plane, mu + first, mu - first), torch.where(plane, mu_outer, mu_inner))
    return middle.addcmul_(sign, torch.where(salient, second, torch.where(plane, a_outer, a_inner)))


def _level_rows_fake(
    codes: Tensor,
    params: Tensor,
    columns: Tensor | None,
    channels: Tensor | None,
    dtype: torch.dtype,
    length: int,
    *_: Any,
) -> Tensor:
    return codes.new_empty((codes.shape[0] if channels is None else channels.shape[0], length), dtype=dtype)


_run = register("level_rows", _level_rows, _level_rows_fake)
