"""Few levels: q bits of code a value and p numbers per group of 128 values of a row, decoded row by row.

    HQQ      p = 2   (code - zero) · scale                                   numbers scale, zero
    SIGNS    p = q   ((±s0) ± s1) ± ...          bit i of the code is the sign of s_i, 1 is plus
    BILLM    p = 7   of a salient column  (mu_s ± a_s1) ± a_s2               the signs are bit 0 and bit 1
             q = 2   of another           mu ± a of the inner (bit 0 = 0) or the outer group, the sign is bit 1
                     numbers mu_inner, a_inner, mu_outer, a_outer, mu_s, a_s1, a_s2

All in fp32, in this order, every operation rounded, and the result rounded once to the dtype asked for. SIGNS holds both
BCQ and ShiftAdd, whose scales are sums of up to three powers of two, which fp16 holds exactly.

Layout of a row of ``length`` values, nb = ceil(length / 128), the last group padded:

    codes    (C, nb·q·16) uint8    a group's q planes of 16 bytes; plane i has bit i of each code, value j at bit j % 8
                                   of byte j // 8
    params   (C, nb·p·2) uint8     a group's p numbers, fp16
    columns  (1, nb·16) uint8      BILLM alone: one bit a column, shared by all rows: 1 is salient

Numbers are bytes on purpose: an engine that computes in bf16 would round fp16 parameters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import use_triton
from .operator import register

GROUP = 128
"""Values per group of numbers."""
PLANE = GROUP // 8
"""Bytes of a group's plane."""
HQQ, SIGNS, BILLM = range(3)
"""Rules."""
BITS = {HQQ: (2, 3, 4), SIGNS: (2, 3, 4), BILLM: (2,)}
"""What a code of each rule may take."""
# Values that the CPU decodes at once: their fp32 forms stay in the L2 cache.
_CHUNK = 1 << 16


def groups(length: int) -> int:
    """Groups of a row of ``length`` values."""
    return -(-length // GROUP)


def numbers(rule: int, bits: int) -> int:
    """fp16 numbers per group."""
    return {HQQ: 2, SIGNS: bits, BILLM: 7}[rule]


def widths(length: int, rule: int, bits: int) -> tuple[int, ...]:
    """Bytes of a row of ``codes``, of ``params`` and, for BILLM, of ``columns``."""
    nb = groups(length)
    own = nb * bits * PLANE, nb * numbers(rule, bits) * 2
    return (*own, nb * PLANE) if rule == BILLM else own


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Planes (n, nb·bits·16) uint8 of codes (n, nb·128) uint8 below 2^bits."""
    n, nb = codes.shape[0], codes.shape[1] // GROUP
    by_byte = codes.reshape(n, nb, 1, PLANE, 8)
    planes = torch.arange(bits, dtype=torch.uint8, device=codes.device).view(bits, 1, 1)
    return pack_bits(by_byte >> planes & 1).view(n, nb * bits * PLANE)


def pack_bits(values: Tensor) -> Tensor:
    """Bytes (...) of bits (..., 8), 0 or 1, uint8 or bool; the first is the lowest."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
    return (values.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def pack_params(params: Tensor) -> Tensor:
    """``params`` (n, nb·p·2) uint8 of numbers (n, nb, p), rounded to fp16."""
    return params.half().contiguous().view(torch.uint8).view(params.shape[0], params.shape[1] * params.shape[2] * 2)


def unpack_codes(planes: Tensor, bits: int) -> Tensor:
    """Codes (n, nb·128) uint8 of :func:`pack_codes`' planes."""
    return _joined(planes.reshape(-1, bits, PLANE), bits).view(planes.shape[0], planes.shape[1] // bits * 8)


def unpack_bits(data: Tensor) -> Tensor:
    """Bits (n, 8·k), bool, of bytes (n, k)."""
    return _spread(data, _table(data.device, False)).view(data.shape[0], 8 * data.shape[1]).view(torch.bool)


def unpack_params(params: Tensor, count: int) -> Tensor:
    """Numbers (n, nb, count) fp32 of a row's bytes."""
    # A copy, because a gathered parameter may begin at any byte of its buffer.
    data = params.clone(memory_format=torch.contiguous_format)
    return data.view(torch.float16).view(data.shape[0], data.shape[1] // (2 * count), count).float()


@cache
def _table(device: torch.device, signs: bool) -> Tensor:
    """What the eight bits of a byte stand for, a byte each: 0 and 1, or -1 and 1 (int8). (256,) int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1 if signs else bits).to(torch.int8).view(torch.int64).view(-1).to(device)


def _spread(data: Tensor, table: Tensor) -> Tensor:
    """Eight bytes of ``table`` for each byte of ``data`` (...): (..., 8) int8."""
    return table.index_select(0, data.reshape(-1).int()).view(torch.int8).view(*data.shape, 8)


def _joined(planes: Tensor, bits: int) -> Tensor:
    """Codes (g, 128) uint8 of planes (g, bits, 16). Eight codes are shifted at once, a byte each."""
    single = _table(planes.device, False).index_select(0, planes.reshape(-1).int()).view(-1, bits, PLANE)
    codes = single[:, 0].clone()
    for i in range(1, bits):
        codes |= single[:, i] << i
    return codes.view(torch.uint8)


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
        codes, params: uint8, laid out as above, of C channels.
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
        from .gpu import levels

        if dtype not in levels.DTYPES:
            return _level_rows(codes, params, columns, channels, torch.float32, length, rule, bits).to(dtype)
        with torch.cuda.device_of(codes):
            return levels.level_rows(codes, params, columns, channels, dtype, length=length, rule=rule, bits=bits)
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
        return _joined(planes, bits).float().view(n, nb, GROUP).sub_(zero).mul_(scale)
    if rule == SIGNS:
        signs = _spread(planes, _table(planes.device, True)).float().view(n, nb, bits, GROUP)
        values = signs[:, :, 0] * params[..., :1]
        for i in range(1, bits):
            # A product with a sign is exact, so that the sum is rounded once, fused or not.
            values.addcmul_(signs[:, :, i], params[..., i : i + 1])
        return values
    assert salient is not None
    mu_inner, a_inner, mu_outer, a_outer, mu, first, second = params.split(1, -1)
    plane = _spread(planes[:, 0], _table(planes.device, False)).view(torch.bool).view(n, nb, GROUP)
    sign = _spread(planes[:, 1], _table(planes.device, True)).float().view(n, nb, GROUP)
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
