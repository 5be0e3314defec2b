"""Estimator factors: the best approximation of their rank; at full rank, the exact scores (equality 3)."""

from __future__ import annotations

import pytest
import torch

from sparselora_dist.method.estimator import low_rank_factors
from sparselora_kernels import gated_ffn_score, kept_count, projection_score, select_channels
from support.compare import assert_close

SILU = torch.nn.functional.silu


@pytest.mark.parametrize("shape", [(17, 11), (11, 17), (13, 13)], ids=str)
def test_full_rank_gives_the_exact_scores(shape: tuple[int, int]) -> None:
    """Equality 3, for the linear score and the gated one."""
    out, hidden = shape
    gate, up, x = torch.randn(out, hidden), torch.randn(out, hidden), torch.randn(29, hidden)
    rows = torch.arange(0, 29, 2)
    factors = [low_rank_factors(weight, min(shape)) for weight in (gate, up)]
    exact = x[rows].double() @ gate.double().t(), x[rows].double() @ up.double().t()
    linear, gated = exact[0].square().sum(0), (SILU(exact[0]) * exact[1]).square().sum(0)
    assert_close("linear", linear, projection_score(x, rows, *factors[0]), rtol=1e-4)
    assert_close("gated", gated, gated_ffn_score(x, rows, *factors, SILU), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_error_is_that_of_the_optimal_truncation(rank: int) -> None:
    weight = torch.randn(33, 21)
    a, b = low_rank_factors(weight, rank)
    assert a.shape == (rank, 21) and b.shape == (33, rank)
    optimum = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    assert_close("error", optimum, (weight.double() - b.double() @ a.double()).norm(), rtol=1e-5)


def test_singular_values_are_split_evenly() -> None:
    weight = torch.randn(12, 9)
    a, b = low_rank_factors(weight, 4)
    values = torch.linalg.svdvals(weight)[:4]
    assert_close("A", values.sqrt(), a.norm(dim=1), rtol=1e-4)
    assert_close("B", values.sqrt(), b.norm(dim=0), rtol=1e-4)


def test_randomised_factors_keep_the_channels_of_the_exact_ones() -> None:
    """On a spectrum that decays as a trained matrix's does, at least 99 % of the kept channels are the same."""
    out, hidden, rank = 1100, 1200, 8  # Above the size from which the randomised SVD is used.
    u, v = (torch.linalg.qr(torch.randn(side, 200)).Q for side in (out, hidden))
    values = torch.arange(1, 201).pow(-0.7)
    root = values[:rank].sqrt()
    exact = root[:, None] * v[:, :rank].t(), u[:, :rank] * root
    x, rows, keep = torch.randn(64, hidden), torch.arange(64), kept_count(out, 0.75)
    kept = [
        set(select_channels(projection_score(x, rows, *factors), keep).tolist())
        for factors in (exact, low_rank_factors((u * values) @ v.t(), rank))
    ]
    assert len(kept[0] & kept[1]) >= 0.99 * keep


def test_randomised_factors_repeat_and_leave_the_random_state_alone() -> None:
    weight = torch.randn(60, 50)
    before = torch.get_rng_state()
    first = low_rank_factors(weight, 5, exact=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    second = low_rank_factors(weight, 5, exact=False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rank_is_cut_to_the_smaller_side() -> None:
    a, b = low_rank_factors(torch.randn(4, 7), 100)
    assert a.shape == (4, 7) and b.shape == (4, 4)


def test_dtype_is_kept_and_rank_zero_refused() -> None:
    assert {t.dtype for t in low_rank_factors(torch.randn(4, 7).bfloat16(), 2)} == {torch.bfloat16}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        low_rank_factors(torch.randn(4, 7), 0)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_weighted_error_is_the_least_there_is(rank: int) -> None:
    """Brute force: with any root R of the moment, the truncated SVD of W R has the least error of its rank."""
    weight, x = torch.randn(14, 9), torch.randn(200, 9) @ torch.diag(torch.arange(1.0, 10.0)) @ torch.randn(9, 9)
    moment = x.double().t() @ x.double() / 200
    root = torch.linalg.cholesky(moment)
    a, b = low_rank_factors(weight, rank, second_moment=moment)
    assert a.shape == (rank, 9) and b.shape == (14, rank)
    least = torch.linalg.svdvals(weight.double() @ root)[rank:].norm()
    error = ((weight - b @ a).double() @ root).norm()
    assert_close("error", least, error, rtol=1e-3, atol=1e-4)
    plain_a, plain_b = low_rank_factors(weight, rank)
    assert error <= ((weight - plain_b @ plain_a).double() @ root).norm() + 1e-4


def test_the_identity_as_moment_is_the_plain_truncation() -> None:
    weight = torch.randn(33, 21)
    (a, b), (plain_a, plain_b) = low_rank_factors(weight, 5, second_moment=torch.eye(21)), low_rank_factors(weight, 5)
    assert_close("B·A", plain_b @ plain_a, b @ a, rtol=1e-4, atol=1e-5)


def test_a_singular_moment_weighs_what_it_spans() -> None:
    """Fewer tokens than features: what the tokens bring is exact as soon as the rank holds it."""
    weight, x = torch.randn(20, 16), torch.randn(3, 16)
    a, b = low_rank_factors(weight, 3, second_moment=x.t() @ x)
    assert_close("Wx", x @ weight.t(), x @ a.t() @ b.t(), rtol=1e-3, atol=1e-4)


def test_a_moment_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 7\) matrix is \(4, 4\)"):
        low_rank_factors(torch.randn(4, 7), 2, second_moment=torch.eye(4))
