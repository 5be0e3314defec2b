"""Selection: how many channels, and which; the same answer everywhere."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparselora_kernels as kernels
from sparselora_kernels import reference


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"),
    [(10, 0.7, 3), (10, 0.0, 10), (10, 0.99, 1), (1, 0.5, 1), (3, 0.5, 2), (14336, 0.99, 144), (1000, 0.999, 1),
     (100, 0.9, 10), (100, 0.8, 20), (64, 0.75, 16), (5, 0.999999, 1), (11, 0.1, 10),
     (2047, 0.99, 21), (2048, 0.99, 32), (2816, 0.99, 32), (28672, 0.99, 288), (2050, 0.0001, 2050)],
)  # fmt: skip
def test_kept_count(channels: int, sparsity: float, kept: int) -> None:
    assert kernels.kept_count(channels, sparsity) == kept


@given(st.integers(1, 30_000), st.integers(0, 999))
def test_kept_count_is_the_ceiling_of_decimal_arithmetic(channels: int, thousandths: int) -> None:
    exact = max(1, math.ceil((1 - Fraction(thousandths, 1000)) * channels))
    if channels >= 2048:
        exact = min(math.ceil(Fraction(exact, 16)) * 16, channels)
    assert kernels.kept_count(channels, thousandths / 1000) == exact


def test_ties_give_the_lowest_index() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    assert kernels.select_channels(scores, 2).tolist() == [1, 2]
    assert kernels.select_channels(scores, 4).tolist() == [0, 1, 2, 4]
    assert kernels.select_channels(torch.zeros(100), 3).tolist() == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e30]) | st.floats(0, 1e6, width=32), min_size=1), st.data())
def test_equals_reference(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(1, len(values)))
    got = kernels.select_channels(scores, keep)
    assert torch.equal(got, reference.select_channels(scores, keep))
    assert got.dtype == torch.int64
    assert got.tolist() == sorted(set(got.tolist()))


def test_long_ties_repeat() -> None:
    scores = torch.randint(0, 4, (20_001,)).float()
    first = kernels.select_channels(scores, 7_777)
    assert torch.equal(first, reference.select_channels(scores, 7_777))
    assert torch.equal(first, kernels.select_channels(scores, 7_777))
