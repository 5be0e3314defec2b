"""What a training step costs in FLOPs: dense LoRA, and as executed.

Per token and multiply-add 2 FLOPs. A frozen matrix costs its forward and its input gradient, a LoRA matrix its weight
gradient too; attention's two products are counted causally (half the square) and with their backward. Elementwise work
is not counted, nor is the recomputation of activation checkpointing, which scales both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparselora_kernels import kept_count, kept_per_expert

from .channels import FFN, HeadGeometry
from .masked_flops import MaskedTokens, MaskedWork

_FROZEN = 4  # 2 forward, 2 input gradient
_TRAINED = 6  # and 2 weight gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShare:
    """Kept share of each group's channels in one layer, 1.0 where it is dense."""

    ffn: float = 1.0
    qk: float = 1.0
    vo: float = 1.0
    experts: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """Elements of one layer's frozen matrices, where the layers of a model are not all alike."""

    query: int = 0
    """Of q; as many as of o. Zero where the attention's channels are not known."""
    key: int = 0
    """Of k; as many as of v."""
    gate: int = 0
    """Of what stands beside the queries in their matrix, and is never sparse."""
    fused: bool = False
    """Whether q, k and v are one matrix: the last layer then runs its queries at all dense tokens."""
    ffn: int = 0
    """Of gate, up and down; of an FFN without a gate up and down."""
    width: int = 0
    """Neurons of that FFN."""
    inputs: int = 2
    """Matrices before its activation, which are scored: gate and up, or one."""
    products: int = 0
    """Width of the queries, all heads: what attention's two products cost by."""
    experts: int = 0
    """Elements of the routed experts that a token meets."""
    active: int = 0
    """How many of them."""
    expert_width: int = 0
    """Neurons of one."""
    other: int = 0
    """Elements of what is always dense that a token meets: routers, fused matrices, gates, experts of another layout."""


def layer_shares(
    layers: int,
    channels: Mapping[str, int] | Sequence[Mapping[str, int]],
    sparsity: Mapping[str, Mapping[int, float]],
) -> tuple[LayerShare, ...]:
    """Kept share of every group in every layer.

    Args:
        layers: how many there are.
        channels: of a layer, by group; of each layer, where they differ.
        sparsity: group -> layer -> sparsity; what is not named is dense.
    """
    of = [channels] * layers if isinstance(channels, Mapping) else channels

    def share(group: str, layer: int, sparsity: float) -> float:
        count = of[layer][group]
        return kept_channels(group, count, sparsity) / count

    return tuple(
        LayerShare(**{g: share(g, layer, by[layer]) for g, by in sparsity.items() if layer in by})
        for layer in range(layers)
    )


def kept_channels(group: str, count: int, sparsity: float) -> int:
    """How many of a group's channels are kept; of ``experts`` of each."""
    return (kept_per_expert if group == "experts" else kept_count)(count, sparsity)


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
    sizes: tuple[LayerSize, ...] = ()
    """Of each layer; left out where all are of ``hidden``, ``width`` and ``heads``."""
    trims: bool = True
    """Whether the last layer runs them at those positions only."""
    masked: MaskedWork | None = None
    """Adapters that keep the zeros of a pruned base."""

    def __post_init__(self) -> None:
        if self.sizes == (self._usual,) * len(self.layers):
            object.__setattr__(self, "sizes", ())

    @property
    def _usual(self) -> LayerSize:
        products = self.heads.heads * self.heads.head_dim
        return LayerSize(query=self.query, key=self.key, ffn=self.ffn, width=self.width, products=products)

    def size(self, layer: int) -> LayerSize:
        """Of one layer; negative numbers count from the end."""
        return self.sizes[layer] if self.sizes else self._usual

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
        return 3 * self.hidden * self.width

    def layer_elements(self, layer: int, share: LayerShare) -> float:
        """Elements of a layer's matrices that a token meets."""
        size = self.size(layer)
        sparse = (share.qk + share.vo) * (size.query + size.key) + share.ffn * size.ffn + share.experts * size.experts
        return sparse + size.gate + size.other

    def trimmed_elements(self, share: LayerShare) -> float:
        """Those among them that the last layer leaves out at a position without logits."""
        size = self.size(-1)
        if not self.trims:
            return 0.0
        # Of one matrix with k and v, queries are left out with the other rows that context tokens do not take.
        whole = size.fused and share.qk == 1
        queries = 0.0 if whole else share.qk * size.query + size.gate
        return queries + share.vo * size.query + share.ffn * size.ffn

    def _per_token(self, length: float) -> float:
        """FLOPs per token outside the sparse matrices: attention products, LoRA, LM head."""
        attention = self.products * 3 * 4 * length / 2
        return attention + _TRAINED * self.lora_elements + _FROZEN * self.hidden * self.vocabulary

    @property
    def products(self) -> int:
        """Width of the queries, of all layers together."""
        return sum(self.size(layer).products for layer in range(len(self.layers)))

    @property
    def frozen(self) -> float:
        """Elements of all layers' matrices that a token meets, dense."""
        return sum(self.layer_elements(layer, LayerShare()) for layer in range(len(self.layers)))

    def dense(self, tokens: float, length: float) -> float:
        """A step with ``tokens`` real tokens in sequences of ``length``, all computed densely."""
        return tokens * (self._per_token(length) + _FROZEN * self.frozen)

    @property
    def quadratic(self) -> float:
        """FLOPs per token squared of attention, over those per token of everything else, in a dense step."""
        linear = self.dense(1, 0)
        return (self.dense(1, 1) - linear) / linear

    def executed(
        self,
        dense_tokens: float,
        context_tokens: float,
        length: float,
        logits: float | None = None,
        products: int = 1,
    ) -> float:
        """The same step with ``context_tokens`` of its tokens computed sparsely, estimator and masks included.

        ``logits`` is the number of positions, all dense, that the LM head runs at, and the last layer's q, o and FFN;
        ``None`` means that both run at all of them. ``products`` is the number of micro-batches, of all ranks together,
        that the tokens are in.
        """
        plain = self._executed(dense_tokens, context_tokens, length, logits)
        return plain + self.masks(dense_tokens, context_tokens, logits, products)

    def masks(
        self, dense: float, context: float, logits: float | None, products: int, forward_only: bool = False
    ) -> float:
        """FLOPs of masked adapters above those of plain ones; ``forward_only``: of one forward."""
        if self.masked is None:
            return 0.0
        tokens = MaskedTokens(
            layers=self.layers,
            dense=dense,
            context=context,
            labels=logits if self.trims else None,
            trimmed=TRIMMED,
            products=products,
        )
        return self.masked.extra(tokens, forward_only)

    def _executed(self, dense_tokens: float, context_tokens: float, length: float, logits: float | None) -> float:
        if logits is None:
            context = self._per_token(length) + sum(map(self._sparse, range(len(self.layers)), self.layers))
            return self.dense(dense_tokens, length) + context_tokens * context
        # The last layer's FFN does not enter what context tokens cost: there a saving of zero is exactly zero.
        whole, last = LayerShare(), replace(self.layers[-1], ffn=1.0) if self.trims else self.layers[-1]
        trained = _TRAINED * self.lora_elements_trimmed if self.trims else 0
        read = _FROZEN * (self.hidden * self.vocabulary + self.trimmed_elements(whole)) + trained
        every = self._per_token(length) - _FROZEN * self.hidden * self.vocabulary - trained
        dense = self.frozen - self.trimmed_elements(whole)
        number = len(self.layers) - 1
        context = sum(map(self._sparse, range(number), self.layers[:-1])) + self._sparse(number, last)
        context -= _FROZEN * self.trimmed_elements(last)
        return logits * read + dense_tokens * (every + _FROZEN * dense) + context_tokens * (every + context)

    def _sparse(self, layer: int, share: LayerShare) -> float:
        """FLOPs of a context token in the matrices of a layer, estimator included."""
        return _FROZEN * self.layer_elements(layer, share) + self._estimator(self.size(layer), share)

    def _estimator(self, size: LayerSize, layer: LayerShare) -> float:
        matrices = (layer.ffn < 1) * size.inputs + (layer.qk < 1) * 2 + (layer.vo < 1)
        routed = (layer.experts < 1) * 2 * size.active
        wide = (layer.ffn < 1) * size.inputs * size.width + routed * size.expert_width
        return 2 * self.estimator_rank * (self.hidden * (matrices + routed) + wide)
