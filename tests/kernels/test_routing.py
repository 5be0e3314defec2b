"""Tokens to their experts and back, against a sorted list of pairs: values and gradients."""

from __future__ import annotations

import pytest
import torch

import sparselora_kernels as kernels
from sparselora_kernels.reference import routing

EXPERTS = 4


def test_pairs_there_and_back() -> None:
    chosen = torch.tensor([[0, 2], [3, 0], [2, 3], [0, 3], [1, 0]])
    rows = torch.tensor([0, 2, 3])
    pairs = kernels.expert_pairs(chosen, rows, EXPERTS)
    assert pairs.ends.tolist() == [2, 2, 4, 6]
    x = torch.randn(5, 3, requires_grad=True)
    there = kernels.spread(x, pairs)
    assert torch.equal(there, x[[0, 3, 0, 2, 2, 3]])
    back = kernels.collect(there * 2, pairs)
    assert torch.allclose(back, 4 * x[rows])
    (grad,) = torch.autograd.grad(back.square().sum(), x)
    expected = torch.zeros_like(x)
    expected[rows] = 32 * x.detach()[rows]
    assert torch.allclose(grad, expected)


CASES = [(5, 2, (4, 0, 3)), (6, 1, (1, 2)), (3, 3, ()), (7, 4, tuple(range(7)))]


@pytest.mark.parametrize(("tokens", "slots", "rows"), CASES)
def test_pairs_are_those_of_a_sorted_list(tokens: int, slots: int, rows: tuple[int, ...]) -> None:
    chosen = torch.stack([torch.randperm(EXPERTS)[:slots] for _ in range(tokens)])
    some = torch.tensor(rows, dtype=torch.long)
    pairs = kernels.expert_pairs(chosen, some, EXPERTS)
    expected, ends = routing.expert_pairs(chosen, some, EXPERTS)
    assert pairs.ends.tolist() == ends and pairs.experts.tolist() == [expert for expert, _, _ in expected]
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(expected), 3, dtype=torch.float64, requires_grad=True)
    for got, want, leaf in (
        (kernels.spread(x, pairs), routing.spread(x, chosen, some, EXPERTS), x),
        (kernels.collect(y, pairs), routing.collect(y, chosen, some, EXPERTS), y),
    ):
        assert torch.equal(got, want) or torch.allclose(got, want)
        weight = torch.randn_like(got)
        grads = [torch.autograd.grad((out * weight).sum(), leaf, allow_unused=True)[0] for out in (got, want)]
        assert torch.allclose(*(torch.zeros_like(leaf) if grad is None else grad for grad in grads))
