"""What a training step costs in FLOPs: dense LoRA, and as executed.

Per token and multiply-add 2 FLOPs. A frozen matrix costs its forward and its input gradient, a LoRA matrix its weight
gradient too; attention's two products are counted causally (half the square) and with their backward. Elementwise work
is not counted, nor is the recomputation of activation checkpointing, which scales both sides alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from .channels import HeadGeometry

_FROZEN = 4  # 2 forward, 2 input gradient
_TRAINED = 6  # and 2 weight gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """Kept share of each group's channels in one layer, 1.0 where it is dense."""

    ffn: float = 1.0
    qk: float = 1.0
    vo: float = 1.0


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

    @property
    def _attention_matrices(self) -> tuple[int, int]:
        """Elements of (q + k, v + o)."""
        q, kv = self.heads.heads * self.heads.head_dim, self.heads.kv_heads * self.heads.head_dim
        return self.hidden * (q + kv), self.hidden * (q + kv)

    def _per_token(self, length: float) -> float:
        """FLOPs per token outside the sparse matrices: attention products, LoRA, LM head."""
        width = self.heads.heads * self.heads.head_dim
        attention = len(self.layers) * 3 * 4 * width * length / 2
        return attention + _TRAINED * self.lora_elements + _FROZEN * self.hidden * self.vocabulary

    def dense(self, tokens: float, length: float) -> float:
        """A step with ``tokens`` real tokens in sequences of ``length``, all computed densely."""
        qk, vo = self._attention_matrices
        frozen = len(self.layers) * (qk + vo + 3 * self.hidden * self.width)
        return tokens * (self._per_token(length) + _FROZEN * frozen)

    def executed(self, dense_tokens: float, context_tokens: float, length: float, logits: float | None = None) -> float:
        """The same step with ``context_tokens`` of its tokens computed sparsely, estimator included.

        ``logits`` is the number of positions that the LM head runs at; ``None`` means all of them.
        """
        qk, vo = self._attention_matrices
        ffn, context = 3 * self.hidden * self.width, self._per_token(length)
        for layer in self.layers:
            context += _FROZEN * (layer.qk * qk + layer.vo * vo + layer.ffn * ffn) + self._estimator(layer)
        tokens = dense_tokens + context_tokens
        unused = 0.0 if logits is None else tokens - logits
        return (
            self.dense(dense_tokens, length)
            + context_tokens * context
            - unused * _FROZEN * self.hidden * self.vocabulary
        )

    def _estimator(self, layer: LayerShare) -> float:
        matrices = (layer.ffn < 1) * 2 + (layer.qk < 1) * 2 + (layer.vo < 1)
        low = 2 * self.estimator_rank * self.hidden * matrices
        return low + (layer.ffn < 1) * 2 * 2 * self.estimator_rank * self.width
