"""Frozen attention projections and the down projection of a sparse layer.

They take the place of the frozen ``nn.Linear`` (inside PEFT's LoRA layer, where there is one), so that the family's own
attention code runs unchanged on full-width tensors, and PEFT's LoRA branch stays as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparselora_kernels import indexed_linear, indexed_projection, select_channels

from ..sync.masks import Site
from .context import MicroBatch, SparseContext
from .estimator import AttentionEstimator

Role = Literal["q", "k", "v", "o"]


def compute_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast asks for; as it is without autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FrozenLinear(nn.Module):
    """Takes the place of a frozen ``nn.Linear``, with its weight stored so that the channel is dim 0.

    Args:
        linear: what it replaces; gives the bias and the sizes.
        stored: ``weight`` (out, in) of the linear itself, or transposed (down, o) as ``weight_t`` (in, out), so that a
            kept channel is one contiguous row there too.
        transposed: which of the two ``stored`` is.
    """

    def __init__(self, linear: nn.Linear, stored: nn.Parameter, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_parameter("weight_t" if transposed else "weight", stored)
        self.register_parameter("bias", linear.bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # PEFT asks a base layer for its weight's device and dtype. A view, so that nothing is copied.
        if name == "weight" and self.transposed:
            return self.weight_t.t()
        return super().__getattr__(name)

    @property
    def stored(self) -> nn.Parameter:
        """The weight with the channel as dim 0."""
        return self.weight_t if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in) -> (..., out), all channels."""
        return self.rows(compute_input(x), None)

    def rows(self, x: Tensor, channels: Tensor | None) -> Tensor:
        """The product at ``channels`` alone: (T, in) -> (T, k), or transposed (T, k) -> (T, out)."""
        bias: Tensor | None = self.bias
        flat = x.reshape(-1, x.shape[-1])
        y = indexed_linear(flat, self.stored, bias, channels, transposed=self.transposed)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, transposed={self.transposed}"


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
        return {group: select_channels(scores[group], keep) for group, keep in self.keep.items()}

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

    def __init__(self, linear: nn.Linear, stored: nn.Parameter, *, role: Role, channels: AttentionChannels) -> None:
        super().__init__(linear, stored, transposed=role == "o")
        self.role = role
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in) -> (..., out)."""
        batch = self.channels.context.active()
        x = compute_input(x)
        if batch is None:
            return self.rows(x, None)
        assert batch.partition is not None
        flat = x.reshape(-1, x.shape[-1])
        rows = self.channels.rows(self.role, flat, batch)
        bias: Tensor | None = self.bias
        y = indexed_projection(
            flat,
            self.stored,
            bias,
            batch.partition.dense,
            batch.partition.context,
            rows,
            transposed=self.transposed,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, role={self.role!r}, layer={self.channels.site.layer}"
