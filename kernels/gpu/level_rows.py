"""Decoding rows of few levels in one launch; layout and rules in :mod:`sparselora_kernels.levels`.

A program decodes a run of groups of one row: it reads a group's planes and numbers (which may begin anywhere, so fp16 is
put together from bytes) and writes 128 values, the eight of a byte by one thread. Sums and products are each rounded in
fp32: no fusion.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..levels import BILLM, BITS, HQQ, SIGNS, groups, numbers
from .tiles import rounded
from .variants import TYPE_NAMES, Variant

# Groups per program: 2048 values, 16 a thread.
GROUPS, NUM_WARPS = 16, 4
# fp16, which no run computes in, is rounded from fp32: every variant costs every target a compilation.
DTYPES = (torch.bfloat16, torch.float32)
_NAMES = {HQQ: "hqq", SIGNS: "signs", BILLM: "billm"}
_FREE = ("nb", "row_bytes", "code_stride", "param_stride")


@triton.jit
def _number(at, inside):
    """fp32 (GROUPS, 1, 1) of the fp16 at any address."""
    bits = tl.load(at, mask=inside, other=0).to(tl.uint16)
    bits |= tl.load(at + 1, mask=inside, other=0).to(tl.uint16) << 8
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _plane(at, inside):
    """Bits (GROUPS, 16, 8) int32 of bytes at addresses (GROUPS, 16, 1)."""
    byte = tl.load(at, mask=inside, other=0).to(tl.int32)
    return (byte >> tl.arange(0, 8)[None, None, :]) & 1


@triton.jit
def _signed(bit, number):
    """The number, or its negative where the bit is 0."""
    return tl.where(bit == 1, number, -number)


@triton.jit(do_not_specialize=_FREE)
def level_rows_kernel(
    codes,  # (C, nb * BITS * 16) uint8, rows code_stride apart
    fp16s,  # params: (C, nb * NUMBERS * 2) uint8, rows param_stride apart; that name is taken by Triton's launcher.
    columns,  # (1, nb * 16) uint8, of BILLM alone
    channels,  # (k,) int64
    out,  # (k, 8 * row_bytes)
    nb,  # Groups of a row.
    row_bytes,  # Bytes of a plane of a row that hold values.
    code_stride,
    param_stride,
    RULE: tl.constexpr,  # 0 HQQ, 1 SIGNS, 2 BILLM
    BITS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    per_row = tl.cdiv(nb, GROUPS)
    place = (tl.program_id(0) // per_row).to(tl.int64)
    group = (tl.program_id(0) % per_row * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    byte = tl.arange(0, 16)[None, :, None]
    some, inside = group < nb, group * 16 + byte < row_bytes
    row = tl.load(channels + place)
    code_at = codes + row * code_stride + group * (BITS * 16) + byte
    param_at = fp16s + row * param_stride + group * (NUMBERS * 2)
    plane = _plane(code_at, inside)
    if RULE == 0:
        code = plane
        for i in tl.static_range(1, BITS):
            code |= _plane(code_at + i * 16, inside) << i
        values = (code.to(tl.float32) - _number(param_at + 2, some)) * _number(param_at, some)
    elif RULE == 1:
        values = _signed(plane, _number(param_at, some))
        for i in tl.static_range(1, BITS):
            values += _signed(_plane(code_at + i * 16, inside), _number(param_at + 2 * i, some))
    else:
        salient = _plane(columns + group * 16 + byte, inside) == 1
        mu = _number(param_at + 8, some)
        first = _number(param_at + 10, some)
        middle = tl.where(plane == 1, _number(param_at + 4, some), _number(param_at, some))
        middle = tl.where(salient, mu + _signed(plane, first), middle)
        width = tl.where(plane == 1, _number(param_at + 6, some), _number(param_at + 2, some))
        width = tl.where(salient, _number(param_at + 12, some), width)
        values = middle + _signed(_plane(code_at + 16, inside), width)
    at = (place * row_bytes + group * 16 + byte) * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out + at, rounded(values, out.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """Every dtype, and every rule with its bits."""
    pointers = {"codes": "*u8", "fp16s": "*u8", "columns": "*u8", "channels": "*i64"}
    for dtype in DTYPES:
        for rule, allowed in BITS.items():
            for bits in allowed:
                name = TYPE_NAMES[dtype]
                missing: dict[str, object] = {} if rule == BILLM else {"columns": None}
                yield Variant(
                    kernel=level_rows_kernel,
                    label=f"levels {_NAMES[rule]} {bits} {name}",
                    signature=pointers | {"out": f"*{name}"} | dict.fromkeys(_FREE, "i32"),
                    constants=missing | _constants(rule, bits),
                    num_warps=NUM_WARPS,
                    fp_fusion=False,
                    aligned=("codes", "fp16s", "channels", "out"),
                )


def _constants(rule: int, bits: int) -> dict[str, object]:
    return {"RULE": rule, "BITS": bits, "NUMBERS": numbers(rule, bits), "GROUPS": GROUPS}


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
    rows = codes.shape[0] if channels is None else channels.shape[0]
    # Whole bytes of bits: a length that 8 does not divide is cut off afterwards.
    row_bytes = -(-length // 8)
    out = codes.new_empty((rows, 8 * row_bytes), dtype=dtype)
    if out.numel():
        codes, params = (part if part.stride(1) == 1 else part.contiguous() for part in (codes, params))
        columns = None if columns is None else columns.contiguous()
        if channels is None:
            channels = torch.arange(rows, device=codes.device)
        nb = groups(length)
        level_rows_kernel[(rows * triton.cdiv(nb, GROUPS),)](
            codes, params, columns, channels, out, nb, row_bytes, codes.stride(0), params.stride(0),
            **_constants(rule, bits), num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out if length == 8 * row_bytes else out[:, :length].contiguous()
