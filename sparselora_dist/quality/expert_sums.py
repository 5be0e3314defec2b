"""Score sums of a mixture's routed experts in a dense forward: exact, and as the estimator gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparselora_kernels import expert_pairs, expert_score, grouped_linear, spread

from ..codecs import FrozenMatrix
from ..layouts import Experts, combined, innermost
from ..method.channels import EXPERTS

Factors = tuple[Tensor, Tensor]
"""``A`` (E·r, in) and ``B`` (E·W, r)."""


class ExpertSums:
    """What the experts were given in one forward.

    Args:
        experts: of the layer.
        x: (..., H), the input; ``chosen`` and ``weights`` (T, K), the router's.
        rows: context tokens of each half of the batch.
    """

    def __init__(self, experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor, rows: Sequence[Tensor]) -> None:
        self.experts = experts
        module: Any = experts.module
        self.combine = combined(getattr(module, "family", module), experts.activation, experts.interleaved)
        self.biases: tuple[Tensor, Tensor] | None = None
        if (bias := getattr(module, "gate_up_proj_bias", None)) is not None:
            both = experts.first_last(bias).unflatten(1, (2, experts.width))
            self.biases = both[:, 0].flatten(), both[:, 1].flatten()
        flat = x.detach().reshape(-1, x.shape[-1])
        chosen, weights = (given.reshape(flat.shape[0], -1) for given in (chosen, weights))
        weights = weights.masked_fill(chosen >= experts.count, 0.0)
        chosen = chosen.clamp(max=experts.count - 1)
        self.halves = []
        for some in rows:
            pairs = expert_pairs(chosen, some, experts.count)
            by_pair = weights.index_select(0, some).flatten().index_select(0, pairs.order)
            self.halves.append((spread(flat, pairs), pairs, by_pair))

    def exact(self) -> Tensor:
        """(halves, 1, E·W) fp32, of the frozen matrices."""
        stored = innermost(self.experts.module).gate_up_proj
        weight = stored.stored if isinstance(stored, FrozenMatrix) else self.experts.gate_up_rows(stored.detach())
        found = []
        for x, pairs, by_pair in self.halves:
            gate, up = (half.float() for half in grouped_linear(x, weight, pairs.ends).chunk(2, -1))
            if self.biases is not None:
                first, second = (bias.float().view(self.experts.count, -1) for bias in self.biases)
                gate, up = gate + first[pairs.experts], up + second[pairs.experts]
            hidden = (self.combine(gate, up).float() * by_pair[:, None].float()).square_()
            sums = hidden.new_zeros(self.experts.count, self.experts.width)
            found.append(sums.index_add_(0, pairs.experts, hidden).flatten()[None])
        return torch.stack(found)

    def estimated(self, factors: dict[str, Factors], rank: int) -> Tensor:
        """The same by factors cut to a smaller ``rank``."""
        own = []
        for name in EXPERTS:
            a, b = (part.to(self.halves[0][0].device) for part in factors[name])
            own.append((a.view(self.experts.count, -1, a.shape[1])[:, :rank].flatten(0, 1), b[:, :rank]))
        gate, up = own
        found = [
            expert_score(x, pairs.ends, by_pair, gate, up, self.combine, self.biases)[None]
            for x, pairs, by_pair in self.halves
        ]
        return torch.stack(found)
