"""The attention projections of a sparse layer.

They take the place of the frozen linears (inside PEFT's LoRA layers, where there are some), so that the family's own
attention code runs unchanged on full-width tensors. The LoRA branch is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sparselora_kernels import select_checked

from ..codecs.linear import FrozenLinear
from ..sync.masks import Site
from .context import SparseContext
from .estimator import AttentionEstimator
from .micro_batch import MicroBatch
from .traced import Handle, kept

Role = Literal["q", "k", "v", "o"]
_GROUP = {"q": "qk", "k": "qk", "v": "vo", "o": "vo"}
_OWNED = {"q": "q_rows", "k": "k_rows", "v": "v_rows", "o": "o_columns"}
"""Methods of :class:`~..method.channels.HeadGeometry`."""


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
        self.handle = Handle(self)

    def _select(self, x: Tensor, batch: MicroBatch) -> Callable[[], dict[str, Tensor]]:
        assert batch.partition is not None
        sync = self.context.sync
        reduction = sync.start(self.site, *self.estimator(x, batch.partition.context))

        def masks() -> dict[str, Tensor]:
            scores = self.estimator.scores(*reduction.wait())
            chosen = {}
            for group, usual in self.keep.items():
                keep = self.context.keep(self.site.layer, group, usual)
                chosen[group], flag = select_checked(scores[group], keep)
                sync.watch(self.site, flag)
            return chosen

        return masks

    def rows(self, role: Role, x: Tensor, batch: MicroBatch) -> Tensor:
        """Kept rows of the projection ``role`` (columns for o). ``x`` (T, H) is read where the mask is new."""
        if not torch.compiler.is_compiling():
            return self.kept(role, x, batch)
        group = _GROUP[role]
        channels = self.context.keep(self.site.layer, group, self.keep[group])
        return kept(self.handle, role, x, batch, channels * self.estimator.geometry.owned(role))

    def kept(self, role: str, x: Tensor, batch: MicroBatch) -> Tensor:
        if finish := self.context.choose(batch, self.site, self.groups, lambda: self._select(x, batch)):
            finish()
        key = self.site.layer, role
        if (found := batch.rows.get(key)) is None:
            owned = getattr(self.estimator.geometry, _OWNED[role])
            found = batch.rows[key] = owned(batch.masks[self.site.layer, _GROUP[role]])
        return found


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

    def lists(self, x: Tensor) -> dict[str, Tensor]:
        batch = self.channels.context.active(self.channels.site.layer, _GROUP[self.role], self.role)
        if batch is None:
            return {}
        assert batch.partition is not None
        return {
            "dense_rows": batch.partition.dense,
            "context_rows": batch.partition.context,
            "channels": self.channels.rows(self.role, x, batch),
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, role={self.role!r}, layer={self.channels.site.layer}"
