"""The scores of experts equal their reference, on a CPU and as one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.compare import assert_close
from support.kernel_cases import implementations, running, wide

EXPERTS = 4
# Rows of each expert, channels of each, length.
CASES = [((3, 0, 5, 1), 7, 5), ((0, 0, 2, 0), 6, 9), ((0, 0, 0, 0), 5, 3), ((8, 4, 0, 9), 24, 32)]


@pytest.mark.parametrize("case", CASES, ids=str)
@implementations
@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
def test_scores(case: tuple, biased: bool, implementation: str) -> None:
    rows, channels, length = case
    dtype = torch.bfloat16 if implementation == "triton" else torch.float32
    x, weights = torch.randn(sum(rows), length).to(dtype), torch.rand(sum(rows))
    factors = [
        (torch.randn(EXPERTS * 2, length).to(dtype) / 4, torch.randn(EXPERTS * channels, 2).to(dtype) / 4) for _ in "gu"
    ]
    biases = (torch.randn(EXPERTS * channels) / 4, torch.randn(EXPERTS * channels) / 4) if biased else None

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    ends = torch.tensor(rows).cumsum(0).int()
    with running(implementation):
        got, again = (kernels.expert_score(x, ends, weights, *factors, combine, biases) for _ in range(2))
    assert torch.equal(got, again) and got.dtype == torch.float32
    double: Any = [tuple(wide(t) for t in pair) for pair in factors]
    wide_biases = None if biases is None else tuple(wide(t) for t in biases)
    expected = reference.expert_score(wide(x), ends, wide(weights), *double, combine, wide_biases)
    rtol, atol = (0.05, 1e-2 * max(float(expected.max()), 1e-3)) if dtype == torch.bfloat16 else (1e-4, 1e-6)
    assert_close("scores", expected, got, rtol=rtol, atol=atol)
