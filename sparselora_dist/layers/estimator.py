"""The estimator factors of a layer as modules: frozen parameters, sharded with the weights that they belong to.

Parameters and not buffers, because neither ZeRO nor FSDP shards a buffer; modules of their own, so that an engine's
forward hooks gather them when, and only when, a mask is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from sparselora_kernels import (
    Pairs,
    activation_name,
    expert_score,
    ffn_score,
    gated_ffn_score,
    projection_scores,
)

from ..method.channels import HeadGeometry

Factors = tuple[Tensor, Tensor]


def _register(module: nn.Module, name: str, factors: Factors) -> None:
    for suffix, tensor in zip("ab", factors):
        module.register_parameter(f"{name}_{suffix}", nn.Parameter(tensor, requires_grad=False))


class FFNEstimator(nn.Module):
    """Σ_t [act((B_g A_g x_t)_j) · (B_u A_u x_t)_j]² over the given rows: ``forward(x (T, H), rows) -> ((I,),)`` fp32."""

    is_estimator: ClassVar[bool] = True
    gate_a: nn.Parameter
    gate_b: nn.Parameter
    up_a: nn.Parameter
    up_b: nn.Parameter

    def __init__(self, gate: Factors, up: Factors, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        _register(self, "gate", gate)
        _register(self, "up", up)
        # By name where it has one: kernels need that, and computing it anew in every forward is needless.
        self.activation = activation_name(activation) or activation

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor]:
        return (gated_ffn_score(x, rows, (self.gate_a, self.gate_b), (self.up_a, self.up_b), self.activation),)


class ExpertsEstimator(nn.Module):
    """Scores of the neurons of all experts from each expert's own factors: ``A`` (E·r, H) and ``B`` (E·W, r) of gate and
    of up, expert after expert; see :func:`sparselora_kernels.expert_score`."""

    gate_a: nn.Parameter
    gate_b: nn.Parameter
    up_a: nn.Parameter
    up_b: nn.Parameter

    def __init__(self, gate: Factors, up: Factors) -> None:
        super().__init__()
        _register(self, "gate", gate)
        _register(self, "up", up)

    def forward(
        self,
        x: Tensor,
        pairs: Pairs,
        weights: Tensor,
        combine: Callable[[Tensor, Tensor], Tensor],
        biases: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor]:
        """``x`` (S, H) and the router's ``weights`` (S,) by pair -> ((E·W,),) fp32."""
        gate, up = (self.gate_a, self.gate_b), (self.up_a, self.up_b)
        return (expert_score(x, pairs.ends, weights, gate, up, combine, biases),)


class PlainFFNEstimator(nn.Module):
    """Σ_t act((B A x_t)_j + b_j)² over the given rows, of an FFN without a gate: ``forward(x (T, H), rows, b) -> ((I,),)``.

    The score is ours (:func:`sparselora_kernels.ffn_score`).
    """

    is_estimator: ClassVar[bool] = True
    up_a: nn.Parameter
    up_b: nn.Parameter

    def __init__(self, up: Factors, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        _register(self, "up", up)
        # The family's own, which has its place in the model already: in a tuple it is no child of this module.
        self.activation = (activation,)

    def forward(self, x: Tensor, rows: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (ffn_score(x, rows, (self.up_a, self.up_b), self.activation[0], bias),)


class AttentionEstimator(nn.Module):
    """Additive score sums of q, k and v: ``forward(x (T, H), rows)`` -> one (n,) fp32 each, see :meth:`scores`.

    The product of the qk score is taken after the sums were added over tokens *and* ranks, so what is returned
    are its factors: ``[Σ‖q̂‖² (pairs), Σ‖k̂‖² (pairs), Σ v̂² (vo channels)]``, for the groups asked for.
    """

    is_estimator: ClassVar[bool] = True
    """For who looks at an attention's children."""

    def __init__(self, factors: Mapping[str, Factors], geometry: HeadGeometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.qk = "q_proj" in factors
        self.vo = "v_proj" in factors
        for name, pair in factors.items():
            _register(self, name.removesuffix("_proj"), pair)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        names = (["q", "k"] if self.qk else []) + (["v"] if self.vo else [])
        factors = [(getattr(self, f"{name}_a"), getattr(self, f"{name}_b")) for name in names]
        sums = dict(zip(names, projection_scores(x, rows, factors)))
        if self.qk:
            sums["q"] = self.geometry.q_pair_sums(sums["q"])
            sums["k"] = self.geometry.k_pair_sums(sums["k"])
        return tuple(sums.values())

    def scores(self, *sums: Tensor) -> dict[str, Tensor]:
        """Scores by group from (reduced) sums: ``qk`` (kv_heads * D/2,), ``vo`` (kv_heads * D,)."""
        scores: dict[str, Tensor] = {}
        if self.qk:
            scores["qk"] = sums[0] * sums[1]
        if self.vo:
            scores["vo"] = sums[-1]
        return scores
