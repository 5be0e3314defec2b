"""Rows of a matrix of few levels as values; rules and layout in :mod:`.levels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .levels import GROUP, HQQ, SIGNS, groups, numbers, unpack_bits, unpack_codes, unpack_params, unpack_signs
from .operator import register

# Values that the CPU decodes at once: few enough for its caches, many enough for what an operation costs by itself.
_CHUNK = 1 << 18


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
    salient = None if columns is None else unpack_bits(columns).view(torch.uint8).view(1, nb, GROUP) << bits
    step = max(_CHUNK // (nb * GROUP), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        if channels is None:
            planes, own = codes[part], params[part]
        else:
            planes, own = (data.index_select(0, channels[part]) for data in (codes, params))
        own = unpack_params(own, numbers(rule, bits))
        if rule == SIGNS:
            values = _signed(planes, own)
        elif rule == HQQ:
            scale, zero = own.split(1, -1)
            values = unpack_codes(planes, bits).view(-1, nb, GROUP).float().sub_(zero).mul_(scale)
        else:
            assert salient is not None
            place = unpack_codes(planes, bits).view(-1, nb, GROUP) | salient
            values = _billm(own).to(dtype).gather(2, place.long())
        out[part] = values.view(values.shape[0], nb * GROUP)[:, :length]
    return out


def _signed(planes: Tensor, params: Tensor) -> Tensor:
    """Values (n, nb, 128) fp32. A product with a sign is exact, so that each sum is rounded once, fused or not."""
    n, nb, bits = params.shape
    first, *others = unpack_signs(planes).view(n, nb, bits, GROUP).unbind(2)
    values = first.float().mul_(params[..., :1])
    for i, signs in enumerate(others, start=1):
        values.addcmul_(signs.float(), params[..., i : i + 1])
    return values


def _billm(params: Tensor) -> Tensor:
    """The levels (n, nb, 8) fp32 of the codes of other columns, then of salient ones."""
    mu_inner, a_inner, mu_outer, a_outer, mu, first, second = params.unbind(-1)
    low, high = mu - first, mu + first
    others = [mu_inner - a_inner, mu_outer - a_outer, mu_inner + a_inner, mu_outer + a_outer]
    return torch.stack([*others, low - second, high - second, low + second, high + second], -1)


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
