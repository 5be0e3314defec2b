"""What the channels of a mixture's experts are worth, from each expert's own low-rank factors.

    score_e,j = Σ_s [ w_s · gate((B_g A_g x_s)_j + b_g,j, (B_u A_u x_s)_j + b_u,j) ]²     over the pairs s of expert e

with ``w`` the router's weight: the bank is one FFN of E·W neurons, and that is the value of its neurons. An expert without
pairs scores zero. Every sum has a fixed order. Scores carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grouped import grouped_product, one_launch, runs

Factors = tuple[Tensor, Tensor]
"""``A`` (E·r, in) and ``B`` (E·W, r)."""
Gate = Callable[[Tensor, Tensor], Tensor]
"""Gate and up before the activation, (n, W) each -> (n, W); elementwise."""

# As in the FFN's score: a block of tokens stays in a core's cache.
_BLOCK = 64


@torch.no_grad()
def expert_score(
    x: Tensor,
    ends: Tensor,
    weights: Tensor,
    gate: Factors,
    up: Factors,
    combine: Gate,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The scores of all channels, (E·W,) fp32.

    Args:
        x: (S, H), the token of each pair, in the order of the experts.
        ends: (E,) int32, where each expert's pairs end.
        weights: (S,), the router's.
        gate, up: factors.
        combine: the experts' gate.
        biases: (E·W,) of gate and up.
    """
    experts = ends.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        if one_launch(x):
            return _by_launch(x, ends, weights, gate, up, combine, biases).flatten()
        width = gate[1].shape[0] // experts
        a = [factor.to(x.dtype).view(experts, -1, x.shape[1]) for factor, _ in (gate, up)]
        b = [factor.float().view(experts, width, -1) for _, factor in (gate, up)]
        bias = None if biases is None else [one.float().view(experts, width) for one in biases]
        scores = x.new_zeros(experts, width, dtype=torch.float32)
        for expert, first, end in runs(ends):
            low = [torch.nn.functional.linear(x[first:end], factor[expert]).float() for factor in a]
            for start in range(0, end - first, _BLOCK):
                block = slice(start, start + _BLOCK)
                both = [one[block] @ factor[expert].t() for one, factor in zip(low, b)]
                if bias is not None:
                    both = [one.add_(more[expert]) for one, more in zip(both, bias)]
                hidden = combine(both[0], both[1]).float() * weights[first + start : end][:_BLOCK, None]
                scores[expert] += hidden.square_().sum(0)
        return scores.flatten()


def _by_launch(
    x: Tensor,
    ends: Tensor,
    weights: Tensor,
    gate: Factors,
    up: Factors,
    combine: Gate,
    biases: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(E, W): the estimate is written once, in the dtype of ``x``, and summed run by run."""
    experts = ends.shape[0]
    owners = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device, dtype=ends.dtype), right=True)
    both = []
    for number, (a, b) in enumerate((gate, up)):
        low = grouped_product(x, a.to(x.dtype).view(experts, -1, x.shape[1]), ends)
        estimate = grouped_product(low, b.to(x.dtype).view(experts, -1, low.shape[1]), ends)
        if biases is not None:
            estimate = estimate + biases[number].to(x.dtype).view(experts, -1).index_select(0, owners)
        both.append(estimate)
    hidden = combine(both[0], both[1]).float().mul_(weights.float()[:, None]).square_()
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    return torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)
