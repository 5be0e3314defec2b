"""What fp8 products need besides ``torch._scaled_mm``: rounding rows and turning codes (:mod:`sparselora_kernels.fp8`).

e4m3fn is put together from the bits of fp32: the kernels compile where the type does not exist, and run in the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import TYPE_NAMES, Variant

BLOCK, TILE, NUM_WARPS = 1024, 64, 4
DTYPES = (torch.bfloat16, torch.float32)
_ROUND_FREE = ("length", "wide", "stride", "given")
_TURN_FREE = ("k", "length", "wide", "stride")
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _values(x, factors, place, column, length, stride, given):
    inside = column < length
    values = tl.load(x + place * stride + column, mask=inside, other=0.0).to(tl.float32)
    if given:
        values *= tl.load(factors + column, mask=inside, other=0.0)
    return values


@triton.jit
def _e4m3(values):
    """fp32 to the nearest e4m3fn, ties to even; 448 for more than that, and NaN for NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448.
    # A step of 2^-9 below 2^-6: where 2^14 is added, fp32 rounds to that.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - 0x3C000000) >> 20
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit(do_not_specialize=_ROUND_FREE)
def round_rows_kernel(
    x,  # (n, length)
    factors,  # (length,) fp32
    codes,  # (n, wide) uint8
    scales,  # (n,) fp32
    length,
    wide,
    stride,
    given,  # Whether there are factors.
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        values = _values(x, factors, place, start + tl.arange(0, BLOCK), length, stride, given)
        largest = tl.maximum(largest, tl.abs(values))
        broken |= (values != values).to(tl.int32)
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), 448.0), _SMALLEST)
    scale = tl.where(tl.max(broken, 0) > 0, float("nan"), scale)
    tl.store(scales + place, scale)
    for start in range(0, wide, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = _values(x, factors, place, column, length, stride, given)
        tl.store(codes + place * wide + column, _e4m3(tl.div_rn(values, scale)), mask=column < wide)


@triton.jit(do_not_specialize=_TURN_FREE)
def turned_kernel(
    rows,  # (k, length) uint8
    out,  # (cdiv(length, 16) * 16, wide) uint8
    k,
    length,
    wide,  # k, up to a multiple of 16.
    stride,
    TILE: tl.constexpr,
):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (i < k)[:, None] & (j < length)[None, :]
    codes = tl.load(rows + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0)
    inside = (j < tl.cdiv(length, 16) * 16)[:, None] & (i < wide)[None, :]
    tl.store(out + j.to(tl.int64)[:, None] * wide + i[None, :], tl.trans(codes), mask=inside)


def variants() -> Iterator[Variant]:
    """Rounding from both dtypes, and turning."""
    for dtype in DTYPES:
        pointers = {"x": f"*{TYPE_NAMES[dtype]}", "factors": "*fp32", "codes": "*u8", "scales": "*fp32"}
        yield Variant(
            kernel=round_rows_kernel,
            label=f"round_rows {TYPE_NAMES[dtype]}",
            signature=pointers | dict.fromkeys(_ROUND_FREE, "i32"),
            constants={"BLOCK": BLOCK},
            num_warps=NUM_WARPS,
            aligned=("codes", "scales"),
        )
    yield Variant(
        kernel=turned_kernel,
        label="turned",
        signature={"rows": "*u8", "out": "*u8"} | dict.fromkeys(_TURN_FREE, "i32"),
        constants={"TILE": TILE},
        num_warps=NUM_WARPS,
        aligned=("out",),
    )


def round_rows(x: Tensor, factors: Tensor | None, wide: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparselora_kernels.fp8.round_rows`; ``wide`` is the width of the codes."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape[0], wide, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if x.shape[0]:
        given = scales if factors is None else factors.contiguous()
        round_rows_kernel[(x.shape[0],)](
            x, given, codes, scales, x.shape[1], wide, x.stride(0), int(factors is not None),
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return codes, scales


def turned(rows: Tensor, n: int, k: int) -> Tensor:
    """Codes (k', n') uint8, turned: (n, k), zeros where there were none; ``n`` and ``k`` are the next multiples of 16."""
    out = rows.new_empty(n, k)
    if out.numel():
        grid = triton.cdiv(k, TILE), triton.cdiv(n, TILE)
        turned_kernel[grid](
            rows, out, rows.shape[0], rows.shape[1], k, rows.stride(0), TILE=TILE, num_warps=NUM_WARPS
        )  # fmt: skip
    return out
