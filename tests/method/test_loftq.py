"""LoftQ's alternation: each start is the best of its rank, and what is subtracted does not depend on who subtracts it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_dist.method.loftq import alternate, less
from support.compare import assert_close


def coarse(weight: Tensor) -> Tensor:
    return (weight * 2).round() / 2


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_the_rounds_are_the_papers(rounds: int, scaling: float) -> None:
    weight = torch.randn(40, 28)
    product = shifted = torch.zeros(40, 28, dtype=torch.float64)
    for _ in range(rounds):
        shifted = product
        stored = coarse((weight.double() - shifted).float())
        product = truncated(weight - stored, 5)
    *_, (shift, (a, b)) = alternate(weight, coarse, 5, scaling, rounds)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((5, 28), (40, 5), torch.float32, torch.float32)
    assert_close("start", product, scaling * b.double() @ a.double(), rtol=1e-4, atol=1e-5)
    assert (shift is None) == (rounds == 1)
    if shift:
        assert_close("shift", shifted, shift[1].double() @ shift[0].double(), rtol=1e-4, atol=1e-5)
    # Its two sides are alike: neither learns faster.
    assert_close("sides", (a @ a.t()).diagonal(), (b.t() @ b).diagonal(), rtol=1e-4)


def test_rounds_bring_the_stored_sum_nearer() -> None:
    weight = torch.randn(64, 48)
    errors = [float((weight - coarse(weight)).norm())]
    for rounds in (1, 5):
        *_, (shift, (a, b)) = alternate(weight, coarse, 8, 1.0, rounds)
        stored = coarse(less(weight, *shift) if shift else weight)
        errors.append(float((weight - stored - b @ a).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_where_inputs_are_known_a_start_is_the_best_of_the_outputs() -> None:
    """Against the best of rank 5 of the outputs themselves; errors that cancel there mislead the one of the weights."""
    weight, inputs = torch.randn(40, 28), torch.randn(400, 6) @ torch.randn(6, 28) + 0.05 * torch.randn(400, 28)
    moment = inputs.t() @ inputs
    upper = torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True).float()
    left = weight - coarse(weight)
    *_, (_, (a, b)) = alternate(weight, coarse, 5, 2.0, 1, upper=upper)
    *_, (_, (plain_a, plain_b)) = alternate(weight, coarse, 5, 2.0, 1)
    assert_close("outputs", truncated(left @ inputs.t(), 5), 2.0 * b @ (a @ inputs.t()), rtol=1e-3, atol=1e-3)
    errors = [float((inputs @ (left - one).t()).norm()) for one in (2.0 * b @ a, 2.0 * plain_b @ plain_a)]
    assert errors[0] < 0.5 * errors[1]
    assert_close("sides", (a @ a.t()).diagonal(), (b.t() @ b).diagonal(), rtol=1e-3)


def test_a_rank_above_the_matrix_is_filled_with_zeros() -> None:
    weight = torch.randn(3, 7)
    *_, (_, (a, b)) = alternate(weight, coarse, 5, 2.0, 1)
    assert (a.shape, b.shape) == ((5, 7), (3, 5)) and not a[3:].any() and not b[:, 3:].any()
    assert_close("whole", weight - coarse(weight), 2.0 * b @ a, rtol=1e-4, atol=1e-5)


def test_the_randomised_start_repeats_itself() -> None:
    weight = torch.randn(1030, 1040)
    first, second = (next(alternate(weight, coarse, 4, 1.0, 1, seed=7))[1] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_split_of_rows_and_either_orientation_gives_the_same_bits(dtype: torch.dtype) -> None:
    weight, a, b = torch.randn(70, 52).to(dtype), torch.randn(9, 52), torch.randn(70, 9)
    whole = less(weight, a, b)
    assert whole.dtype == torch.float32
    assert_close("less", weight.double() - b.double() @ a.double(), whole, rtol=1e-6, atol=1e-6)
    for step in (1, 7, 33):
        parts = [less(weight[i : i + step], a, b[i : i + step]) for i in range(0, 70, step)]
        assert torch.equal(torch.cat(parts), whole)
    turned = weight.t().contiguous()
    parts = [less(turned[i : i + 5], b.t(), a.t()[i : i + 5]) for i in range(0, 52, 5)]
    assert torch.equal(torch.cat(parts).t(), whole)
    assert less(weight[:0], a, b[:0]).shape == (0, 52)
