"""What Triton's interpreter, in which kernels are tested without a GPU, does differently with bf16: products, rounding."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32: (M, K), (K, N), (M, N). Operands of one dtype: bf16, fp16, or fp32 (IEEE, not TF32)."""
    if INTERPRETED:
        # It multiplies the bits of bf16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 to ``DTYPE``, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        # It cuts the low bits off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
