"""The attention projections of a sparse layer.

They take the place of the frozen linears (inside PEFT's LoRA layers, where there are some), so that the family's own
attention code runs unchanged on full-width tensors. The LoRA branch is whole.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sparselora_kernels import select_channels

from ..codecs.linear import Branch, FrozenLinear, compute_input
from ..sync.masks import Site
from .context import MicroBatch, SparseContext
from .estimator import AttentionEstimator

Role = Literal["q", "k", "v", "o"]
_GROUP = {"q": "qk", "k": "qk", "v": "vo", "o": "vo"}


class AttentionChannels:
    """Chooses the qk and vo channels of one layer; shared by its q, k, v and o projections.

    Not a module: it refers to the estimator, which is registered once, under the attention.
    """

    def __init__(self, context: SparseContext, layer: int, estimator: AttentionEstimator, keep: dict[str, int]) -> None:
        self.context = context
        self.site = Site(layer, "attention")
        self.estimator = estimator
        self.keep = keep
        self.groups = tuple(keep)

    def _select(self, x: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        assert batch.partition is not None
        sums = self.estimator(x, batch.partition.context)
        scores = self.estimator.scores(self.context.sync.reduce(self.site, sums))
        return {
            group: select_channels(scores[group], self.context.keep(self.site.layer, group, keep))
            for group, keep in self.keep.items()
        }

    def rows(self, role: Role, x: Tensor, batch: MicroBatch) -> Tensor:
        """Kept rows of the projection ``role`` (columns for o). ``x`` (T, H) is read where the mask is new."""
        self.context.choose(batch, self.site, self.groups, lambda: self._select(x, batch))
        geometry, masks = self.estimator.geometry, batch.masks
        if role == "q":
            return geometry.q_rows(masks[self.site.layer, "qk"])
        if role == "k":
            return geometry.k_rows(masks[self.site.layer, "qk"])
        if role == "v":
            return geometry.v_rows(masks[self.site.layer, "vo"])
        return geometry.o_columns(masks[self.site.layer, "vo"])


class SparseProjection(FrozenLinear):
    """A frozen q, k, v or o: whole for dense tokens, kept channels for context tokens, nothing for padding."""

    def __init__(self, frozen: FrozenLinear, *, role: Role, channels: AttentionChannels) -> None:
        super().__init__(
            frozen.in_features,
            frozen.out_features,
            frozen.bias,
            frozen.codec,
            dict(zip(frozen.part_names, frozen.parts)),
            transposed=frozen.transposed,
        )
        self.train(frozen.training)
        self.role = role
        self.channels = channels

    def product(self, x: Tensor, branch: Branch | None = None, **options: Any) -> Tensor:
        """``x`` (..., in) -> (..., out); the LoRA branch, where one is given, is whole for all tokens."""
        batch = self.channels.context.active(self.channels.site.layer, _GROUP[self.role], self.role)
        if batch is None:
            return super().product(x, branch, **options)
        assert batch.partition is not None
        return super().product(
            x,
            branch,
            dense_rows=batch.partition.dense,
            context_rows=batch.partition.context,
            channels=self.channels.rows(self.role, compute_input(x).reshape(-1, x.shape[-1]), batch),
            **options,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, role={self.role!r}, layer={self.channels.site.layer}"
