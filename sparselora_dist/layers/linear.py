"""The attention projections of a sparse layer.

They take the place of the frozen linears (inside PEFT's LoRA layers, where there are some), so that the family's own
attention code runs unchanged on full-width tensors. The LoRA branch is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A frozen q, k, v or o: whole for dense tokens, kept channels for context tokens, nothing for padding.

    Args:
        frozen: the matrix as it is stored.
        places: what of it is sparse: role -> its rows in the stored matrix, (n,) int64, or ``None`` where it is all of it.
            q, k and v may be in one matrix; rows of no role (another group's, a gate's) are whole for context tokens.
        channels: chooses.
    """

    def __init__(
        self, frozen: FrozenLinear, *, places: Mapping[Role, Tensor | None], channels: AttentionChannels
    ) -> None:
        super().__init__(
            frozen.in_features,
            frozen.out_features,
            frozen.bias,
            frozen.codec,
            dict(zip(frozen.part_names, frozen.parts)),
            transposed=frozen.transposed,
        )
        self.train(frozen.training)
        self.roles = tuple(places)
        self.places = dict(places)
        self.channels = channels
        others = torch.ones(self.out_features, dtype=torch.bool)
        for rows in self.places.values():
            others[slice(None) if rows is None else rows] = False
        self.others = others.nonzero().flatten()

    def lists(self, x: Tensor) -> dict[str, Tensor]:
        context, layer = self.channels.context, self.channels.site.layer
        found = {role: context.active(layer, _GROUP[role], role) for role in self.roles}
        batch = next(filter(None, found.values()), None)
        if batch is None:
            return {}
        assert batch.partition is not None
        if self.places[self.roles[0]] is None:
            rows = self.channels.rows(self.roles[0], x, batch)
        else:
            rows = self._rows(x, batch, [role for role in self.roles if found[role]])
        return {"dense_rows": batch.partition.dense, "context_rows": batch.partition.context, "channels": rows}

    def _rows(self, x: Tensor, batch: MicroBatch, sparse: list[Role]) -> Tensor:
        """Rows that context tokens take, (k,) int64 ascending, of a matrix that holds more than one thing."""
        key = self.channels.site.layer, "+".join(self.roles)
        if key in batch.rows and not torch.compiler.is_compiling():
            return batch.rows[key]
        if self.others.device != x.device:  # Once: a copy from the host waits.
            self.others = self.others.to(x.device)
            self.places = {role: None if rows is None else rows.to(x.device) for role, rows in self.places.items()}
        own = [self.others]
        for role in self.roles:
            rows = self.places[role]
            assert rows is not None
            if role in sparse:
                own.append(rows.index_select(0, self.channels.rows(role, x, batch)))
            # In the last layer a query that is not dense is read by nobody.
            elif batch.last_layer != self.channels.site.layer:
                own.append(rows)
        chosen = torch.cat(own).sort().values
        if not torch.compiler.is_compiling():
            batch.rows[key] = chosen
        return chosen

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, roles={self.roles}, layer={self.channels.site.layer}"
