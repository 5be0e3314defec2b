"""What a training step costs in FLOPs: dense LoRA, and as executed.

Per token and multiply-add 2 FLOPs. A frozen matrix costs its forward and its input gradient, a LoRA matrix its weight
gradient too; attention's two products are counted causally (half the square) and with their backward. Elementwise work
is not counted, nor is the recomputation of activation checkpointing, which scales both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparselora_kernels import kept_count

from .channels import FFN, HeadGeometry

_FROZEN = 4  # 2 forward, 2 input gradient
_TRAINED = 6  # and 2 weight gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """Kept share of each group's channels in one layer, 1.0 where it is dense."""

    ffn: float = 1.0
    qk: float = 1.0
    vo: float = 1.0


def layer_shares(
    layers: int, channels: Mapping[str, int], sparsity: Mapping[str, Mapping[int, float]]
) -> tuple[LayerShare, ...]:
    """Kept share of every group in every layer.

    Args:
        layers: how many there are.
        channels: of a layer, by group.
        sparsity: group -> layer -> sparsity; what is not named is dense.
    """
    return tuple(
        LayerShare(**{g: kept_count(channels[g], by[layer]) / channels[g] for g, by in sparsity.items() if layer in by})
        for layer in range(layers)
    )


TRIMMED = ("q_proj", "o_proj", *FFN, "gate_up_proj")
"""Matrices that the last layer runs at the positions of the logits only, where the LM head does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopModel:
    """Shapes of a model with LoRA."""

    hidden: int
    width: int
    vocabulary: int
    heads: HeadGeometry
    lora_elements: int
    """Trainable elements of all LoRA matrices, all layers."""
    layers: tuple[LayerShare, ...]
    estimator_rank: int = 8
    lora_elements_trimmed: int = 0
    """Those of the last layer's :data:`TRIMMED` matrices."""
    gated: bool = True
    """Whether the FFN has a gate: three matrices, or up and down alone."""
    query_gate: bool = False
    """Whether q has a gate's rows beside each query's, which are never sparse."""
    fused: bool = False
    """Whether q, k and v are one matrix: the last layer then runs its queries at all dense tokens."""

    @property
    def query(self) -> int:
        """Elements of q; as many as of o."""
        return self.hidden * self.heads.heads * self.heads.head_dim

    @property
    def key(self) -> int:
        """Elements of k; as many as of v."""
        return self.hidden * self.heads.kv_heads * self.heads.head_dim

    @property
    def ffn(self) -> int:
        """Elements of gate, up and down."""
        return (3 if self.gated else 2) * self.hidden * self.width

    @property
    def _gate(self) -> int:
        """Elements of the gate beside the queries."""
        return self.query if self.query_gate else 0

    def layer_elements(self, share: LayerShare) -> float:
        """Elements of a layer's matrices that a token meets."""
        return (share.qk + share.vo) * (self.query + self.key) + self._gate + share.ffn * self.ffn

    def trimmed_elements(self, share: LayerShare) -> float:
        """Those among them that the last layer leaves out at a position without logits."""
        # Of one matrix with k and v, queries are left out with the other rows that context tokens do not take.
        whole = self.fused and share.qk == 1
        queries = 0 if whole else share.qk * self.query + self._gate
        return queries + share.vo * self.query + share.ffn * self.ffn

    def _per_token(self, length: float) -> float:
        """FLOPs per token outside the sparse matrices: attention products, LoRA, LM head."""
        width = self.heads.heads * self.heads.head_dim
        attention = len(self.layers) * 3 * 4 * width * length / 2
        return attention + _TRAINED * self.lora_elements + _FROZEN * self.hidden * self.vocabulary

    def dense(self, tokens: float, length: float) -> float:
        """A step with ``tokens`` real tokens in sequences of ``length``, all computed densely."""
        frozen = len(self.layers) * self.layer_elements(LayerShare())
        return tokens * (self._per_token(length) + _FROZEN * frozen)

    @property
    def quadratic(self) -> float:
        """FLOPs per token squared of attention, over those per token of everything else, in a dense step."""
        linear = self.dense(1, 0)
        return (self.dense(1, 1) - linear) / linear

    def executed(self, dense_tokens: float, context_tokens: float, length: float, logits: float | None = None) -> float:
        """The same step with ``context_tokens`` of its tokens computed sparsely, estimator included.

        ``logits`` is the number of positions, all dense, that the LM head runs at, and the last layer's q, o and FFN;
        ``None`` means that both run at all of them.
        """
        if logits is None:
            context = self._per_token(length) + sum(map(self._sparse, self.layers))
            return self.dense(dense_tokens, length) + context_tokens * context
        # The last layer's FFN does not enter what context tokens cost: there a saving of zero is exactly zero.
        whole, last = LayerShare(), replace(self.layers[-1], ffn=1.0)
        trained = _TRAINED * self.lora_elements_trimmed
        read = _FROZEN * (self.hidden * self.vocabulary + self.trimmed_elements(whole)) + trained
        every = self._per_token(length) - _FROZEN * self.hidden * self.vocabulary - trained
        dense = len(self.layers) * self.layer_elements(whole) - self.trimmed_elements(whole)
        context = sum(map(self._sparse, self.layers[:-1])) + self._sparse(last)
        context -= _FROZEN * self.trimmed_elements(last)
        return logits * read + dense_tokens * (every + _FROZEN * dense) + context_tokens * (every + context)

    def _sparse(self, share: LayerShare) -> float:
        """FLOPs of a context token in the matrices of a layer, estimator included."""
        return _FROZEN * self.layer_elements(share) + self._estimator(share)

    def _estimator(self, layer: LayerShare) -> float:
        inputs = 2 if self.gated else 1
        matrices = (layer.ffn < 1) * inputs + (layer.qk < 1) * 2 + (layer.vo < 1)
        low = 2 * self.estimator_rank * self.hidden * matrices
        return low + (layer.ffn < 1) * inputs * 2 * self.estimator_rank * self.width
