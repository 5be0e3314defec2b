"""Rows of a matrix of few levels as values; rules and layout in :mod:`.levels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .levels import GROUP, HQQ, SIGNS, groups, numbers, unpack_bits, unpack_codes, unpack_params
from .operator import register

# Values that the CPU decodes at once: their fp32 forms stay in the L2 cache.
_CHUNK = 1 << 17


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
    nb = groups(length)
    out = codes.new_empty((rows, length), dtype=dtype)
    salient = None if columns is None else unpack_bits(columns).view(1, nb, GROUP).view(torch.uint8) << bits
    step = max(_CHUNK // (nb * GROUP), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        chosen = part if channels is None else channels[part]
        own = unpack_codes(codes[chosen], bits).view(-1, nb, GROUP)
        if salient is not None:
            own |= salient
        values = _values(own, unpack_params(params[chosen], numbers(rule, bits)), rule, dtype)
        out[part] = values.view(own.shape[0], nb * GROUP)[:, :length]
    return out


def _values(codes: Tensor, params: Tensor, rule: int, dtype: torch.dtype) -> Tensor:
    """From codes (n, nb, 128) uint8 and numbers (n, nb, p) fp32; a salient column's codes are 4 larger."""
    if rule == HQQ:
        scale, zero = params.split(1, -1)
        return codes.float().sub_(zero).mul_(scale)
    levels = torch.stack(_signed(params) if rule == SIGNS else _billm(params), -1).to(dtype)
    return levels.flatten(0, 1).gather(1, codes.flatten(0, 1).long())


def _signed(params: Tensor) -> list[Tensor]:
    """The level of every code, (n, nb) each."""
    first, *others = params.unbind(-1)
    levels = [-first, first]
    for number in others:
        levels = [level - number for level in levels] + [level + number for level in levels]
    return levels


def _billm(params: Tensor) -> list[Tensor]:
    """The levels of the codes of other columns, then of salient ones."""
    mu_inner, a_inner, mu_outer, a_outer, mu, first, second = params.unbind(-1)
    low, high = mu - first, mu + first
    others = [mu_inner - a_inner, mu_outer - a_outer, mu_inner + a_inner, mu_outer + a_outer]
    return [*others, low - second, high - second, low + second, high + second]


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
