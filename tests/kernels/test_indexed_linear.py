"""The indexed products equal their references: plain indexing around a whole product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, reference
from sparselora_kernels.indexed_linear import indexed_nn, indexed_nt
from sparselora_kernels.operands import NNOperands, NTOperands
from support.kernel_cases import compare, implementations, nf4, running, some, wide

# (tokens, chosen tokens, channels, width, kept): odd sizes, one of everything, one kept, all kept, no tokens.
SHAPES = [(5, 3, 7, 3, 4), (1, 1, 1, 1, 1), (33, 20, 65, 17, 1), (19, 19, 21, 13, 21), (6, 0, 9, 5, 4)]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
accumulates = pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])


def check(operation: Any, formula: Any, operands: Any, weight: EncodedWeight, values: Tensor) -> None:
    """``out``, where there is one, is written in place by the operation and not by the formula."""
    expected = formula(type(operands)(*map(wide, operands)), wide(values))
    compare({"y": expected}, {"y": operation(operands, weight)}, operands[0].dtype)


@cases
@dtypes
@pytest.mark.parametrize("form", ["chosen", "all"])
@implementations
def test_nt_equals_reference(shape: tuple, dtype: torch.dtype, form: str, implementation: str) -> None:
    tokens, chosen, channels, width, kept = shape
    x, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(channels, width, dtype=dtype)
    lists = (None, None) if form == "all" else (some(tokens, chosen), some(channels, kept))
    bias = torch.randn(channels, dtype=dtype) if kept > 1 else None
    with running(implementation):
        operands = NTOperands(x, *lists, bias)
        check(indexed_nt, reference.indexed_nt, operands, EncodedWeight((weight,)), weight)


@cases
@dtypes
@accumulates
@implementations
def test_nn_equals_reference(shape: tuple, dtype: torch.dtype, accumulate: bool, implementation: str) -> None:
    tokens, chosen, channels, width, kept = shape
    rows, kept_channels = some(tokens, chosen), some(channels, kept)
    h = torch.randn(chosen, kept, dtype=dtype)
    weight = torch.randn(channels, width, dtype=dtype)
    options: dict[str, Any] = {"out": torch.randn(tokens, width, dtype=dtype), "accumulate": accumulate}
    if kept > 1:
        options |= {"bias": torch.randn(width, dtype=dtype), "low": torch.randn(chosen, 3, dtype=dtype)}
        options["b"] = torch.randn(width, 3, dtype=dtype)
    with running(implementation):
        operands = NNOperands(h, rows, kept_channels, **options)
        check(indexed_nn, reference.indexed_nn, operands, EncodedWeight((weight,)), weight)


@implementations
def test_nf4_rows_are_those_of_the_decoded_matrix(implementation: str) -> None:
    rows, channels = some(9, 6), some(20, 7)
    stored, values = nf4(torch.randn(20, 130))
    nt = NTOperands(torch.randn(9, 130), rows, channels)
    nn = NNOperands(torch.randn(6, 7), rows, channels, torch.randn(9, 130))
    with running(implementation):
        check(indexed_nt, reference.indexed_nt, nt, stored, values)
        check(indexed_nn, reference.indexed_nn, nn, stored, values)
