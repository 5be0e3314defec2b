"""Scores equal their definition: sums over the given tokens of squared estimated activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.compare import assert_close

SILU = torch.nn.functional.silu
# (tokens, hidden, channels, rank, rows summed over); 130 rows are three blocks of the FFN score.
SHAPES = [(9, 7, 5, 3, 6), (1, 1, 1, 1, 1), (150, 12, 33, 8, 130), (64, 6, 3, 2, 64), (5, 7, 4, 2, 0), (0, 7, 4, 2, 0)]
# Sums of ~100 squares: fp32 against fp64; in bf16 the projection onto the factors is rounded to 8 bits.
RTOL = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def inputs(shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    tokens, hidden, channels, rank, count = shape
    factors = [(torch.randn(rank, hidden).to(dtype), torch.randn(channels, rank).to(dtype)) for _ in range(2)]
    return torch.randn(tokens, hidden).to(dtype), torch.randperm(tokens)[:count].sort().values, factors


def compare(expected: Tensor, got: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    scale = float(expected.max()) if expected.numel() else 0.0
    assert_close("scores", expected, got, rtol=RTOL[dtype], atol=RTOL[dtype] * 0.1 * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_projection_score_equals_reference(shape: tuple, dtype: torch.dtype) -> None:
    x, rows, ((a, b), _) = inputs(shape, dtype)
    compare(reference.projection_score(x, rows, a, b), kernels.projection_score(x, rows, a, b), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_gated_ffn_score_equals_reference(shape: tuple, dtype: torch.dtype) -> None:
    x, rows, (gate, up) = inputs(shape, dtype)
    expected = reference.gated_ffn_score(x, rows, gate, up, SILU)
    compare(expected, kernels.gated_ffn_score(x, rows, gate, up, SILU), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_ffn_score_equals_reference(shape: tuple, dtype: torch.dtype, biased: bool) -> None:
    x, rows, (up, _) = inputs(shape, dtype)
    options = {"bias": torch.randn(shape[2]).to(dtype)} if biased else {}
    expected = reference.ffn_score(x, rows, up, SILU, **options)
    compare(expected, kernels.ffn_score(x, rows, up, SILU, **options), dtype)


def test_scores_equal_the_definition_token_by_token() -> None:
    x, rows, ((ag, bg), (au, bu)) = inputs((7, 5, 4, 2, 4), torch.float32)
    linear, gated, plain = (torch.zeros(4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(4)
    for t in rows.tolist():
        for j in range(4):
            low_gate, low_up = ag.double() @ x[t].double(), au.double() @ x[t].double()
            estimate = torch.dot(bg[j].double(), low_gate)
            linear[j] += estimate**2
            plain[j] += SILU(estimate + bias[j]) ** 2
            gated[j] += (SILU(estimate) * torch.dot(bu[j].double(), low_up)) ** 2
    assert_close("projection", linear, kernels.projection_score(x, rows, ag, bg), rtol=1e-5)
    assert_close("plain", plain, kernels.ffn_score(x, rows, (ag, bg), SILU, bias), rtol=1e-5)
    assert_close("ffn", gated, kernels.gated_ffn_score(x, rows, (ag, bg), (au, bu), SILU), rtol=1e-5)


def test_no_rows_score_zero() -> None:
    x, rows, (gate, up) = inputs((5, 7, 4, 2, 0), torch.float32)
    assert torch.equal(kernels.projection_score(x, rows, *gate), torch.zeros(4))
    assert torch.equal(kernels.gated_ffn_score(x, rows, gate, up, SILU), torch.zeros(4))


def test_scores_of_parts_add_up() -> None:
    """Ranks and micro-batches add their sums, so a sum over tokens must split."""
    x, rows, (gate, up) = inputs((150, 12, 33, 8, 130), torch.float32)
    for score in (
        lambda rows: kernels.projection_score(x, rows, *gate),
        lambda rows: kernels.gated_ffn_score(x, rows, gate, up, SILU),
    ):
        assert_close("sum of parts", score(rows), score(rows[:40]) + score(rows[40:]), rtol=1e-4)


def test_runs_are_bit_identical() -> None:
    x, rows, (gate, up) = inputs((150, 12, 33, 8, 130), torch.float32)
    assert torch.equal(kernels.projection_score(x, rows, *gate), kernels.projection_score(x, rows, *gate))
    runs = [kernels.gated_ffn_score(x, rows, gate, up, SILU) for _ in range(2)]
    assert torch.equal(*runs)


def test_autocast_does_not_round_the_sums() -> None:
    """Scores are fp32 sums; autocast must not turn them into bf16 ones, which would choose other channels."""
    x, rows, (gate, up) = inputs((150, 12, 33, 8, 130), torch.float32)
    x = x.bfloat16()
    expected = [kernels.projection_score(x, rows, *gate), kernels.gated_ffn_score(x, rows, gate, up, SILU)]
    with torch.autocast("cpu", torch.bfloat16):
        got = [kernels.projection_score(x, rows, *gate), kernels.gated_ffn_score(x, rows, gate, up, SILU)]
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
