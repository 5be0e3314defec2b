"""A stand-in for ``torch._scaled_mm`` on a CPU: refuses what a GPU refuses, and multiplies decoded operands in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from sparselora_kernels.backend import forced_fp8


def scaled_mm(
    left: Tensor,
    right: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``(left · scale_a) (right · scale_b) + bias``: (M, K) by (K, N), scales (M, 1) and (1, N)."""
    (m, k), n = left.shape, right.shape[1]
    assert left.dtype == right.dtype == torch.float8_e4m3fn
    assert m and k and n and right.shape[0] == k, "nothing to multiply"
    assert k % 16 == 0 and n % 16 == 0, (left.shape, right.shape)
    assert left.is_contiguous() and left.data_ptr() % 16 == 0, "the left operand is not row-major and aligned"
    assert right.t().is_contiguous() and right.data_ptr() % 16 == 0, "the right operand is not column-major and aligned"
    for scale, shape in ((scale_a, (m, 1)), (scale_b, (1, n))):
        assert scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous()
    assert out_dtype == torch.bfloat16 and scale_result is None and not use_fast_accum
    y = (left.float() @ right.float()) * scale_a * scale_b
    if bias is not None:
        assert bias.dtype == torch.bfloat16 and bias.shape == (n,) and bias.is_contiguous()
        y = y + bias.float()
    return y.to(out_dtype)


@contextmanager
def fp8_products() -> Iterator[mock.Mock]:
    """Products of fp8 matrices in fp8 by the stand-in, which is given and counts its calls."""
    with forced_fp8(), mock.patch.object(torch, "_scaled_mm", side_effect=scaled_mm) as product:
        yield product
