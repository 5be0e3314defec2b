"""The weight of a masked adapter equals its formula, and takes the memory of one matrix."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import reference
from sparselora_kernels.masked_weight import masked_weight
from support.compare import TOLERANCE, assert_close
from support.kernel_cases import implementations, nf4, pruned, running

SHAPES = [(1, 1, 1), (7, 100, 3), (33, 130, 16), (40, 256, 20)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stored", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@implementations
def test_equals_reference(shape: tuple[int, int, int], stored: str, dtype: torch.dtype, implementation: str) -> None:
    rows, length, rank = shape
    weight = pruned((rows, length)).to(dtype)
    p, q = torch.randn(rows, rank).to(dtype), torch.randn(rank, length).to(dtype)
    found, values = nf4(weight.float()) if stored == "nf4" else (weight, weight)
    before = [part.clone() for part in getattr(found, "parts", [found])]
    with running(implementation):
        got = masked_weight(found, p, q, 0.7)
    if dtype is torch.bfloat16:
        values = values.to(dtype)
    expected = reference.masked_weight(values.double(), q.double(), p.double(), 0.7)
    assert got.dtype == dtype
    assert_close("masked weight", expected, got, atol=TOLERANCE[dtype][1] * float(expected.abs().max()))
    assert not got[reference.nonzero(values).logical_not()].any(), "what is pruned is exactly zero"
    assert all(map(torch.equal, before, getattr(found, "parts", [found]))), "the stored matrix is read only"


@implementations
def test_in_bf16_it_is_the_merged_matrix_to_the_bit(implementation: str) -> None:
    """One sum in fp32, rounded once: what ``merge`` writes."""
    weight, p, q = pruned((24, 96)).bfloat16(), torch.randn(24, 4).bfloat16(), torch.randn(4, 96).bfloat16()
    with running(implementation):
        got = masked_weight(weight, p, q, 0.5)
    merged = (weight.float() + 0.5 * (p.float() @ q.float())).bfloat16().masked_fill(weight == 0, 0)
    # Sums of products in another order: at most the last bit, rarely.
    assert (got != merged).double().mean() < 0.01
    assert_close("merged", merged.double(), got.double(), rtol=2**-7)
