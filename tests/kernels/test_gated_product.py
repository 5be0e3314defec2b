"""The product in the middle of a dense FFN equals torch's two operations, forward and backward."""

from __future__ import annotations

import pytest
import torch

import sparselora_kernels as kernels
from sparselora_kernels import reference
from sparselora_kernels.activations import ACTIVATIONS
from support.kernel_cases import compare, dtypes, implementations, results, running, wide


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1030), (0, 4)], ids=str)
@dtypes
@implementations
def test_equals_reference(activation: str, shape: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    trained = {"gate": torch.randn(shape, dtype=dtype), "up": torch.randn(shape, dtype=dtype)}
    with running(implementation):
        got = results(kernels.gated_product, trained, activation=activation)
    double = {name: wide(value) for name, value in trained.items()}
    compare(results(reference.gated_product, double, activation=activation), got, dtype)


def test_strided_inputs() -> None:
    gate, up = torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2]
    with running("triton"):
        got = kernels.gated_product(gate, up, "silu")
    torch.testing.assert_close(got, reference.gated_product(gate, up, "silu"))
