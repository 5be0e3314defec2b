"""The products and scores of experts equal their references, in outputs and gradients, on a CPU and as one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.kernel_cases import compare, implementations, nf4, results, running, some, wide

EXPERTS = 4
# Rows of each expert, channels of each, kept ones, length.
CASES = [((3, 0, 5, 1), 7, 4, 5), ((0, 0, 2, 0), 6, 6, 9), ((0, 0, 0, 0), 5, 2, 3), ((8, 4, 0, 9), 24, 16, 32)]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def ends_of(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows).cumsum(0).int()


def kept_of(channels: int, kept: int) -> Tensor:
    return torch.cat([expert * channels + some(channels, kept) for expert in range(EXPERTS)])


# One launch is bf16's alone; its exactness is that of the reference in fp64 on the same values.
def dtype_of(implementation: str) -> torch.dtype:
    return torch.bfloat16 if implementation == "triton" else torch.float32


@cases
@implementations
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("stored", ["plain", "NF4", "all of it"])
def test_frozen(case: tuple, transposed: bool, stored: str, implementation: str) -> None:
    if (stored, implementation) == ("NF4", "triton") and case is not CASES[0]:
        pytest.skip("decoding has tests of its own, and Triton's interpreter is slow")
    rows, channels, kept, length = case
    dtype = dtype_of(implementation)
    weight: Any = torch.randn(EXPERTS * channels, length).to(dtype)
    plain = weight
    if stored == "NF4":
        weight, plain = nf4(weight.float())
        plain = plain.to(dtype)
    chosen = None if stored == "all of it" else kept_of(channels, kept)
    width = length if not transposed else channels if chosen is None else kept
    trained: dict[str, Tensor | None] = {"x": torch.randn(sum(rows), width).to(dtype)}
    fixed = {"ends": ends_of(rows), "channels": chosen, "transposed": transposed}
    with running(implementation):
        got = results(kernels.grouped_linear, trained, weight=weight, **fixed)
    expected = results(reference.grouped_linear, {"x": wide(trained["x"])}, weight=wide(plain), **fixed)
    compare(expected, got, dtype)


@cases
@implementations
def test_trained(case: tuple, implementation: str) -> None:
    rows, channels, _, length = case
    dtype = dtype_of(implementation)
    trained: dict[str, Tensor | None] = {
        "x": torch.randn(sum(rows), length).to(dtype),
        "weight": torch.randn(EXPERTS, channels, length).to(dtype),
    }
    with running(implementation):
        got = results(kernels.grouped_product, trained, ends=ends_of(rows))
    double = {name: wide(tensor) for name, tensor in trained.items()}
    compare(results(reference.grouped_product, double, ends=ends_of(rows)), got, dtype)


def test_selection_is_by_expert_and_prefers_the_lowest_index() -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 2.0, float("nan"), 1.0])
    kept, flag = kernels.select_grouped(scores, 3, 2)
    assert kept.tolist() == [1, 2, 3, 4, 6, 8] and flag.isnan()
    assert kernels.select_grouped(scores.nan_to_num(0.0), 3, 3)[1] == 0.0


def test_kept_per_expert() -> None:
    assert [kernels.kept_per_expert(*case) for case in ((112, 0.6), (704, 0.9), (704, 0.0), (258, 0.001), (4096, 0.99))] == [
        45, 72, 704, 258, 48
    ]  # fmt: skip


def test_a_trained_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.grouped_linear(torch.randn(2, 3), torch.randn(8, 3, requires_grad=True), ends_of((1, 1, 0, 0)))
