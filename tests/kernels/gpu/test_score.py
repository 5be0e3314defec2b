"""The score kernels, in Triton's interpreter, equal the definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from sparselora_kernels.activations import ACTIVATIONS, activate
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.gpu.score import CHUNK
from support.compare import assert_close

# (tokens, hidden, channels, rank, rows summed over): odd sizes; one of everything; a block of channels and one more, a
# rank of two steps, two chunks; all tokens; none.
SHAPES = [
    (9, 7, 5, 3, 6),
    (1, 1, 1, 1, 1),
    (CHUNK + 90, 12, 65, 17, CHUNK + 70),
    (64, 16, 64, 16, 64),
    (5, 7, 4, 2, 0),
    (0, 7, 4, 2, 0),
]
# Sums of ~100 squares, against fp64; 16-bit projections onto the factors are rounded to 8 and 11 bits.
RTOL = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
Factors = list[tuple[Tensor, Tensor]]


def inputs(shape: tuple, dtype: torch.dtype, pairs: int = 2) -> tuple[Tensor, Tensor, Factors]:
    tokens, hidden, channels, rank, count = shape
    factors = [
        (torch.randn(rank, hidden).to(dtype) / hidden**0.5, torch.randn(channels + i, rank).to(dtype))
        for i in range(pairs)
    ]
    return torch.randn(tokens, hidden).to(dtype), torch.randperm(tokens)[:count].sort().values, factors


def compare(name: str, expected: Tensor, got: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == torch.float32
    scale = float(expected.max()) if expected.numel() else 0.0
    assert_close(name, expected, got, rtol=RTOL[dtype], atol=RTOL[dtype] * 0.1 * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_projections_equal_reference(shape: tuple, dtype: torch.dtype) -> None:
    """q, k and v of one input, of different widths."""
    x, rows, factors = inputs(shape, dtype, pairs=3)
    with forced_triton():
        got = kernels.projection_scores(x, rows, factors)
    for index, pair in enumerate(factors):
        compare(f"projection {index}", reference.projection_score(x, rows, *pair), got[index], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_ffn_equals_reference(shape: tuple, dtype: torch.dtype) -> None:
    x, rows, ((gate_a, gate_b), (up_a, up_b)) = inputs(shape, dtype)
    gate, up = (gate_a, gate_b), (up_a, up_b[:-1])
    expected = reference.gated_ffn_score(x, rows, gate, up, torch.nn.functional.silu)
    with forced_triton():
        got = kernels.gated_ffn_score(x, rows, gate, up, "silu")
    compare("ffn", expected, got, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x, rows, (gate, up) = inputs((40, 16, 20, 8, 30), torch.float32)
    gate, up = gate, (up[0], up[1][:-1])
    expected = reference.gated_ffn_score(x, rows, gate, up, partial(activate, name))
    with forced_triton():
        got = kernels.gated_ffn_score(x, rows, gate, up, name)
    compare(name, expected, got, torch.float32)


def test_factors_of_another_dtype_are_not_rounded() -> None:
    x, rows, (pair, _) = inputs((20, 16, 9, 8, 20), torch.float32)
    x = x.bfloat16()
    with forced_triton():
        got = kernels.projection_score(x, rows, *pair)
    expected = kernels.projection_score(x, rows, *pair)
    assert_close("mixed", expected, got, rtol=1e-5)


def test_unselected_rows_are_not_read() -> None:
    x, rows, (gate, up) = inputs((40, 16, 20, 8, 30), torch.float32)
    up = (up[0], up[1][:-1])
    unread = torch.ones(40, dtype=torch.bool)
    unread[rows] = False
    poisoned = x.masked_fill(unread[:, None], float("nan"))
    with forced_triton():
        assert torch.equal(
            kernels.gated_ffn_score(poisoned, rows, gate, up, "gelu"),
            kernels.gated_ffn_score(x, rows, gate, up, "gelu"),
        )


def test_factors_may_be_strided_and_the_ffn_empty() -> None:
    x, rows, (gate, up) = inputs((9, 7, 5, 3, 6), torch.float32)
    up = (up[0], up[1][:-1])
    turned = tuple((a.t().contiguous().t(), b.t().contiguous().t()) for a, b in (gate, up))
    with forced_triton():
        expected = kernels.gated_ffn_score(x, rows, gate, up, "silu")
        assert torch.equal(kernels.gated_ffn_score(x, rows, *turned, "silu"), expected)
        none = [(a, b[:0]) for a, b in (gate, up)]
        assert kernels.gated_ffn_score(x, rows, *none, "silu").shape == (0,)


def test_runs_are_bit_identical() -> None:
    x, rows, factors = inputs((CHUNK + 90, 12, 65, 8, CHUNK + 70), torch.bfloat16)
    gate, up = factors[0], (factors[1][0], factors[1][1][:-1])
    with forced_triton():
        assert torch.equal(*(kernels.gated_ffn_score(x, rows, gate, up, "silu") for _ in range(2)))
        first, second = (torch.cat(kernels.projection_scores(x, rows, factors)) for _ in range(2))
    assert torch.equal(first, second)


def test_gradients_are_not_asked_for() -> None:
    x, rows, (gate, up) = inputs((9, 7, 5, 3, 6), torch.float32)
    up = (up[0], up[1][:-1])
    x.requires_grad_()
    with forced_triton():
        assert not kernels.gated_ffn_score(x, rows, gate, up, "silu").requires_grad
        assert not kernels.projection_score(x, rows, *gate).requires_grad
