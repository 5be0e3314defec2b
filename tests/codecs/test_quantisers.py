"""hqq and bcq against the published algorithms, written plainly: a whole matrix, or a group, at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from sparselora_dist.codecs import bcq, hqq
from support.compare import sqnr


def decoded_hqq(codes: Tensor, params: Tensor) -> Tensor:
    scale, zero = params.float().split(1, -1)
    return ((codes.view(*params.shape[:2], -1) - zero) * scale).flatten(1)


def published_hqq(matrix: Tensor, bits: int) -> Tensor:
    """The round trip: all groups together, with the inverse scale, until the mean error of the matrix grows."""
    w, top, beta = matrix.view(-1, 128), 2**bits - 1, 10.0
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = top / (high - low)
    zero, error = -low * inverse, float("inf")
    for _ in range(20):
        q = (w * inverse + zero).round().clamp(0, top)
        rest = w - (q - zero) / inverse
        e = rest.sign() * (rest.abs() - rest.abs().pow(0.7 - 1) / beta).relu()
        zero = (q - (w - e) * inverse).mean(1, keepdim=True)
        beta *= 1.01
        if rest.abs().mean() >= error:
            break
        error = float(rest.abs().mean())
    q = (w * inverse + zero).round().clamp(0, top)
    return ((q - zero.half()) * (1 / inverse).half()).float().view(matrix.shape)


def library_hqq(matrix: Tensor, bits: int) -> Tensor:
    """The library's own round trip; it is no dependency of this project."""
    quantizer = pytest.importorskip("hqq.core.quantize", reason="the hqq library is not installed").Quantizer
    options = {"nbits": bits, "group_size": 128, "axis": 1, "device": "cpu", "compute_dtype": torch.float16}
    return quantizer.dequantize(*quantizer.quantize(matrix.clone(), **options)).float()


@pytest.mark.parametrize("theirs", [published_hqq, library_hqq])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_hqq_is_as_exact_as_published(theirs: object, bits: int, std: float) -> None:
    """Without outliers, and at 1.0 with errors that count as such."""
    matrix = torch.randn(128, 1024) * std
    expected, got = sqnr(matrix, theirs(matrix, bits)), sqnr(matrix, decoded_hqq(*hqq.quantize(matrix, bits)))  # type: ignore[operator]
    assert abs(got - expected) <= 0.05, (got, expected)


def test_the_power_of_the_shrinking() -> None:
    x = torch.logspace(-30, 30, 4001)
    exact = x.double().pow(-0.3)
    assert ((hqq.inverse_power(x) - exact) / exact).abs().max() < 2**-23
    small, large = torch.tensor([1e-30, 0.16, -0.16]), torch.tensor([0.18, -2.0])
    assert not hqq.shrink(small, 10.0).any()
    expected = large.sign() * (large.abs() - large.abs().pow(-0.3) / 10)
    torch.testing.assert_close(hqq.shrink(large, 10.0), expected, rtol=1e-5, atol=1e-6)


def published_bcq(group: Tensor, bits: int, weights: Tensor) -> Tensor:
    """Scales of a group (width,), by least squares over its signs and a search through all levels, in turn."""
    rest, scales, root = group.double(), [], weights.double().sqrt()
    for _ in range(bits):
        scales.append((rest.abs() * weights).sum() / weights.sum())
        rest = rest - torch.where(rest >= 0, scales[-1], -scales[-1])
    found = torch.stack(scales)
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=bits))).double()
    for _ in range(50):
        signs = patterns[(group.double()[:, None] - patterns @ found).abs().argmin(1)]
        found = torch.linalg.lstsq(signs * root[:, None], (group.double() * root)[:, None]).solution[:, 0]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_bcq_is_what_is_published(bits: int, weighted: bool) -> None:
    groups = torch.randn(6, 128)
    weights = torch.rand(6, 128).square() + 0.01 if weighted else None
    got = bcq.fit(groups, bits, weights)
    expected = [
        published_bcq(*pair) for pair in zip(groups, [bits] * 6, torch.ones(6, 128) if weights is None else weights)
    ]
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def decoded_bcq(codes: Tensor, params: Tensor) -> Tensor:
    signs = 2.0 * (codes.view(*params.shape[:2], -1, 1) >> torch.arange(params.shape[2]) & 1) - 1
    return (signs * params.float()[:, :, None]).sum(-1).flatten(1)


@pytest.mark.parametrize("powers", [False, True], ids=["bcq", "shiftadd"])
def test_codes_are_the_nearest_levels(powers: bool) -> None:
    """Of the scales as they are stored."""
    rows = torch.randn(5, 256)
    codes, params = bcq.quantize(rows, 3, powers=powers)
    error = (decoded_bcq(codes, params) - rows).abs()
    for code in range(8):
        other = decoded_bcq(torch.full_like(codes, code), params)
        assert (error <= (other - rows).abs() + 1e-6).all()


def test_weights_of_columns() -> None:
    """Errors of columns that count more become smaller; equal weights are none."""
    rows, columns = torch.randn(30, 300), torch.rand(300).pow(4)
    plain, weighted = bcq.quantize(rows, 2), bcq.quantize(rows, 2, weights=columns)
    errors = [((decoded_bcq(*found)[:, :300] - rows).square() * columns).sum() for found in (plain, weighted)]
    assert errors[1] < 0.97 * errors[0]
    for other in (columns.expand(30, 300), columns * 7e-20):
        again = bcq.quantize(rows, 2, weights=other)
        torch.testing.assert_close(again[1], weighted[1], rtol=2e-3, atol=1e-6)
    for equal in (torch.ones(300), torch.zeros(300)):
        again = bcq.quantize(rows, 2, weights=equal)
        assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


def test_sums_of_powers() -> None:
    """Every positive fp16: within 1/27, as three times the nearest power leaves at most a third."""
    numbers = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    found = bcq.sums_of_powers(numbers)
    finite = found.isfinite()
    assert (numbers[~finite] > 64000).all()
    numbers, found = numbers[finite].double(), found[finite].double()
    assert ((found - numbers).abs() <= numbers / 27).all()
    assert bcq.sums_of_powers(torch.tensor([0.0, -0.75, 3.0, 2**-24]).half()).tolist() == [0.0, -0.75, 3.0, 2**-24]
