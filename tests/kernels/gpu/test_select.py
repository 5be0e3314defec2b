"""The selection kernel, in Triton's interpreter, equals a Python sort."""

from __future__ import annotations

import pytest
import torch

import sparselora_kernels as kernels
from sparselora_kernels import reference
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.gpu.select import LARGEST, SIZES

INF, NAN = float("inf"), float("nan")
# Every size of the kernel at its end and one past it; odd; one.
COUNTS = sorted({1, 143, *(size for size, _, _ in SIZES), *(size + 1 for size, _, _ in SIZES)})


def select(scores: torch.Tensor, keep: int) -> torch.Tensor:
    with forced_triton():
        return kernels.select_channels(scores, keep)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["distinct", "ties", "wide range"])
def test_equals_reference(count: int, kind: str) -> None:
    scores = {
        "distinct": torch.rand(count),
        "ties": torch.randint(0, 4, (count,)).float(),
        "wide range": torch.exp(torch.empty(count).uniform_(-100, 88)),
    }[kind]
    for keep in sorted({1, count // 100 + 1, count // 2 + 1, count}):
        got = select(scores, keep)
        assert got.dtype == torch.int64
        assert torch.equal(got, reference.select_channels(scores, keep)), keep


def test_extremes() -> None:
    """Zeros of both signs are equal; denormal, largest, infinite and negative scores are in order."""
    smallest, largest = 1e-45, 3.4028234663852886e38
    scores = torch.tensor([0.0, -0.0, smallest, largest, INF, -1.0, -2.0, 0.0, -INF])
    for keep in range(1, scores.numel() + 1):
        assert torch.equal(select(scores, keep), reference.select_channels(scores, keep)), keep


def test_nothing_kept_and_more_than_there_are() -> None:
    assert select(torch.rand(5), 0).shape == (0,)
    assert select(torch.empty(0), 0).shape == (0,)
    assert select(torch.rand(5), 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [9, LARGEST + 9])
def test_nan_is_never_preferred(count: int) -> None:
    """Either path: NaN counts as -inf, so the result is valid and repeats."""
    scores = torch.rand(count) + 0.5
    scores[::2] = NAN
    finite = count // 2
    assert select(scores, finite).tolist() == list(range(1, count, 2))
    expected = reference.select_channels(scores.nan_to_num(nan=-INF), finite + 2)
    assert torch.equal(select(scores, finite + 2), expected)
    assert torch.equal(kernels.select_channels(scores, finite + 2), expected)
    assert select(torch.full((count,), NAN), 3).tolist() == [0, 1, 2]


def test_scores_may_be_strided() -> None:
    scores = torch.rand(50, 2)
    assert torch.equal(select(scores[:, 1], 7), select(scores[:, 1].contiguous(), 7))


@pytest.mark.parametrize("count", [9, LARGEST, LARGEST + 9])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_the_flag_sees_what_is_not_finite(count: int, bad: float) -> None:
    """Wherever it is, and whether it is kept or not; on either path."""
    scores = torch.full((count,), 3.4e38)
    for checked in (kernels.select_checked, _forced):
        assert checked(scores, 4)[1].tolist() == [0.0]
    for place in (0, count // 2, count - 1):
        spoilt = scores.clone()
        spoilt[place] = bad
        for checked in (kernels.select_checked, _forced):
            kept, flag = checked(spoilt, 4)
            assert flag.shape == (1,) and flag.dtype == torch.float32 and flag.item() != 0.0
            assert torch.equal(kept, reference.select_channels(spoilt.nan_to_num(nan=-INF, posinf=INF, neginf=-INF), 4))


def _forced(scores: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    with forced_triton():
        return kernels.select_checked(scores, keep)
