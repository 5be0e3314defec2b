"""BiLLM's binarisation: how good, which columns, which codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_dist.codecs.billm import MOST, fit_groups, nearest, salient_columns, tables_of
from support.compare import sqnr

ALL = torch.ones(128, dtype=torch.bool)
NONE = torch.zeros(1, 128, dtype=torch.bool)


def binarised(groups: Tensor, salient: Tensor, valid: Tensor = ALL) -> tuple[Tensor, Tensor]:
    return nearest(groups, *tables_of(fit_groups(groups, salient, valid[None])), salient)


def test_a_gaussian_keeps_9_dB() -> None:
    """The 9.30 dB of four levels with a break point a row; columns of their own bring a little more."""
    groups = torch.randn(2048, 128)
    salient = salient_columns(groups, torch.ones(1, 128), ALL)
    assert 1 <= salient.sum() <= MOST
    without, chosen = sqnr(groups, binarised(groups, NONE)[1]), sqnr(groups, binarised(groups, salient[None])[1])
    assert without > 9.2 and chosen > max(without, 9.35), (without, chosen)


def test_columns_that_cost_most_are_salient() -> None:
    groups, costs = torch.randn(256, 128), torch.ones(1, 128)
    costs[0, [3, 40, 77, 126]] = 1e4
    salient = salient_columns(groups, costs, ALL)
    assert salient[[3, 40, 77, 126]].all()
    cheap = binarised(groups, NONE)[1]
    error = [((groups - found).square() * costs).sum() for found in (cheap, binarised(groups, salient[None])[1])]
    assert error[1] < 0.8 * error[0]


def test_a_code_is_the_nearest_value_of_its_group() -> None:
    groups = torch.randn(64, 128) * torch.logspace(-3, 1, 64)[:, None]
    salient = torch.rand(1, 128) < 0.1
    tables = tables_of(fit_groups(groups, salient, ALL[None]))
    codes, decoded = nearest(groups, *tables, salient)
    values = torch.where(salient[..., None], tables[1][:, None], tables[0][:, None])  # (64, 128, 4)
    assert torch.equal(decoded, values.gather(2, codes.long()[..., None])[..., 0])
    assert torch.equal((groups - decoded).abs(), (groups[..., None] - values).abs().amin(2))


def test_padding_says_nothing() -> None:
    groups, valid = torch.randn(16, 128), torch.arange(128) < 50
    other = torch.where(valid, groups, 100.0)
    salient = salient_columns(groups, torch.ones(1, 128), valid)
    assert torch.equal(salient, salient_columns(other, torch.ones(1, 128), valid))
    assert not (salient & ~valid).any()
    assert torch.equal(fit_groups(groups, salient[None], valid[None]), fit_groups(other, salient[None], valid[None]))


def test_few_values_and_zeros() -> None:
    """Groups of one value, of equal ones, of nothing but zeros: stored as they are."""
    valid = torch.arange(128) < 1
    groups = torch.zeros(3, 128)
    groups[0, 0], groups[1, 0] = 0.25, -0.5
    assert torch.equal(binarised(groups, NONE, valid)[1][:, 0], groups[:, 0])
    even = torch.full((1, 128), 0.75)
    assert torch.equal(binarised(even, NONE)[1], even)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_fp16_cannot_hold_is_refused(value: float) -> None:
    groups = torch.randn(2, 128)
    groups[1, 7] = value
    with pytest.raises(ValueError, match="billm cannot store"):
        fit_groups(groups, NONE, ALL[None])
