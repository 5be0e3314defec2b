"""The kernels beside fp8 products, in Triton's interpreter: rounding equals torch's to the bit, turning moves bytes."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import fp8
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.gpu.fp8 import turned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["as they are", "with factors"])
def test_rounds_as_torch_does(dtype: torch.dtype, given: bool) -> None:
    """Rows of zeros, of tiny and of huge numbers, with NaN and Inf; a row of more values than are read at a time."""
    for shape in ((8, 37), (2, 1500)):
        x = torch.randn(shape).to(dtype) * torch.logspace(-6, 2, shape[1]).to(dtype)
        if shape[0] > 2:
            # Subnormal, but in bf16, which the interpreter reads otherwise than a GPU.
            x[0], x[1] = 0, x[1] * (1e-38 if dtype is torch.float32 else 1e-30)
            x[2] *= 1e34
            x[3, 5], x[4, 7], x[5, 7] = torch.nan, torch.inf, -torch.inf
        factors = torch.rand(shape[1]) + 0.1 if given else None
        codes, scales = fp8.round_rows(x, factors)
        with forced_triton():
            got_codes, got_scales = fp8.round_rows(x, factors)
        torch.testing.assert_close(got_scales, scales, rtol=0, atol=0, equal_nan=True)
        values, got = (t.view(torch.float8_e4m3fn).float()[:, : shape[1]] for t in (codes, got_codes))
        torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
        assert got_codes.shape == codes.shape and torch.equal(got_codes[0], codes[0])


def test_every_code_and_what_lies_between() -> None:
    """Each value of fp8, the middle between two, and the fp32 beside each, at a scale of one."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([2.0**-10, 2.0**-11, 1e-30, 1e-42])])
    points = torch.cat([points, *(torch.nextafter(points, torch.tensor(end)) for end in (0.0, 448.0))])
    row = torch.cat([points, -points, torch.tensor([448.0])])[None]
    with forced_triton():
        got, scale = fp8.round_rows(row, None)
    assert scale.item() == 1
    assert torch.equal(got[:, : row.shape[1]], row.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (37, 50), (130, 64)], ids=str)
def test_turns_into_zeros(shape: tuple[int, int]) -> None:
    rows = torch.randint(1, 256, (shape[0], shape[1] + 5), dtype=torch.uint8)[:, 3:-2]
    n, k = -(-shape[1] // 16) * 16, -(-shape[0] // 16) * 16
    expected = torch.zeros(n, k, dtype=torch.uint8)
    expected[: shape[1], : shape[0]] = rows.t()
    assert torch.equal(turned(rows, n, k), expected)
