"""Few levels: q bits of code a value and p numbers per group of 128 values of a row. What they mean, and how they lie.

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

import torch
from torch import Tensor

GROUP = 128
"""Values per group of numbers."""
PLANE = GROUP // 8
"""Bytes of a group's plane."""
HQQ, SIGNS, BILLM = range(3)
"""Rules."""
BITS = {HQQ: (2, 3, 4), SIGNS: (2, 3, 4), BILLM: (2,)}
"""What a code of each rule may take."""

_LOWEST = 0x0101010101010101
_TO_THE_TOP = sum(1 << 56 - 7 * j for j in range(8))


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
    eight = codes.contiguous().view(torch.int64).view(n, nb, 1, PLANE)
    planes = torch.arange(bits, device=codes.device).view(bits, 1)
    return _packed(eight >> planes & _LOWEST).view(n, nb * bits * PLANE)


def pack_bits(values: Tensor) -> Tensor:
    """Bytes (n, k) of bits (n, 8·k), 0 or 1, uint8 or bool; the first is the lowest."""
    return _packed(values.to(torch.uint8).clone(memory_format=torch.contiguous_format).view(torch.int64))


def _packed(eight: Tensor) -> Tensor:
    """A byte, uint8, of the lowest bits of eight, each 0 or 1, in an int64. The product has bit j of byte j at 56 + j."""
    return (eight * _TO_THE_TOP >> 56 & 255).to(torch.uint8)


def pack_params(params: Tensor) -> Tensor:
    """``params`` (n, nb·p·2) uint8 of numbers (n, nb, p), rounded to fp16."""
    return params.half().contiguous().view(torch.uint8).view(params.shape[0], params.shape[1] * params.shape[2] * 2)


def unpack_codes(planes: Tensor, bits: int) -> Tensor:
    """Codes (n, nb·128) uint8 of :func:`pack_codes`' planes."""
    n, width = planes.shape
    eight = _spread(planes.reshape(-1)).view(-1, bits, PLANE)
    codes = eight[:, 0].clone()
    for i in range(1, bits):
        codes |= eight[:, i] << i  # Eight codes at once, a byte each.
    return codes.view(torch.uint8).view(n, width // bits * 8)


def unpack_bits(data: Tensor) -> Tensor:
    """Bits (n, 8·k), bool, of bytes (n, k)."""
    return _spread(data.reshape(-1)).view(torch.bool).view(data.shape[0], 8 * data.shape[1])


def unpack_params(params: Tensor, count: int) -> Tensor:
    """Numbers (n, nb, count) fp32 of a row's bytes."""
    # A copy, because a gathered parameter may begin at any byte of its buffer.
    data = params.clone(memory_format=torch.contiguous_format)
    return data.view(torch.float16).view(data.shape[0], data.shape[1] // (2 * count), count).float()


@cache
def _bits(device: torch.device) -> Tensor:
    """The eight bits of a byte, a byte each: (256,) int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1).to(device)


def _spread(data: Tensor) -> Tensor:
    """The bits of bytes (n,), eight in each of (n,) int64."""
    return _bits(data.device).index_select(0, data.int())
