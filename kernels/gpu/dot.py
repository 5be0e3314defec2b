"""The matrix product of a tile, in one precision on every target: 16-bit operands exactly, fp32 as IEEE and not TF32."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32: (M, K), (K, N), (M, N). Operands of one dtype: bf16, fp16, fp32."""
    if INTERPRETED:
        # Triton's interpreter multiplies the bits of bf16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
