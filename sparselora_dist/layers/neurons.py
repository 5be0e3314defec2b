"""Which neurons of a sparse FFN context tokens take: what FFNs with and without a gate have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sparselora_kernels import ffn_down, ffn_up, lora_linear, select_checked

from ..codecs.linear import FrozenLinear, compute_input
from ..layouts import base_linear
from ..method.tokens import TokenPartition
from ..sync.masks import Site
from .context import SparseContext
from .lora import active_branches, kept_update, low_rank_update
from .masked import masked_by
from .micro_batch import MicroBatch
from .traced import Handle, kept

Chosen: TypeAlias = "Tensor | Callable[[], Tensor]"
"""Kept channels; or what waits for the other ranks' scores and gives them, always the same."""


def known(chosen: Chosen) -> Tensor:
    """The channels themselves, waited for if need be."""
    return chosen if isinstance(chosen, Tensor) else chosen()


class NeuronChooser:
    """Chooses the neurons of one layer once for a micro-batch."""

    estimator: Callable[..., tuple[Tensor]]

    def set_up(self, context: SparseContext, layer: int, keep: int, lora_branch: Literal["kept", "dense"]) -> None:
        self.context = context
        self.site = Site(layer, "ffn")
        self.keep = keep
        self.lora_branch = lora_branch
        self.handle = Handle(self)

    def sums(self, x: Tensor, rows: Tensor) -> tuple[Tensor]:
        """What the estimator gives for these tokens, ((I,),) fp32."""
        return self.estimator(x, rows)

    def neurons(self, x: Tensor, batch: MicroBatch) -> Chosen:
        """Those that context tokens take; ``x`` (T, H) is read where the mask is new."""
        if not torch.compiler.is_compiling():
            return self._choose(x, batch)
        return kept(self.handle, "ffn", x, batch, self.context.keep(self.site.layer, "ffn", self.keep))

    def _choose(self, x: Tensor, batch: MicroBatch) -> Chosen:
        finish = self.context.choose(batch, self.site, ("ffn",), lambda: self._select(x, batch))

        def later() -> Tensor:
            assert finish is not None
            finish()
            return batch.masks[self.site.layer, "ffn"]

        return later if finish else batch.masks[self.site.layer, "ffn"]

    def kept(self, role: str, x: Tensor, batch: MicroBatch) -> Tensor:
        """The kept neurons, (k,) int64; ``x`` (T, H) is read where the mask is new."""
        return known(self._choose(x, batch))

    def _select(self, x: Tensor, batch: MicroBatch) -> Callable[[], dict[str, Tensor]]:
        assert batch.partition is not None
        sync = self.context.sync
        reduction = sync.start(self.site, *self.sums(x, batch.partition.context))

        def masks() -> dict[str, Tensor]:
            keep = self.context.keep(self.site.layer, "ffn", self.keep)
            (sums,) = reduction.wait()
            channels, flag = select_checked(sums, keep)
            sync.watch(self.site, flag)
            return {"ffn": channels}

        return masks

    def branch_is_whole(self, *modules: nn.Module) -> bool:
        """Whether LoRA branches keep all neurons, and there are some."""
        return self.lora_branch == "dense" and any(next(active_branches(module), None) for module in modules)


def rows_and_channels(tokens: TokenPartition, chosen: Chosen) -> dict[str, Tensor]:
    """As :func:`project` takes them."""
    return {"dense_rows": tokens.dense, "context_rows": tokens.context, "channels": known(chosen)}


def project_up(outer: nn.Module, x: Tensor, tokens: TokenPartition, chosen: Chosen) -> Tensor:
    """The first matrix of an FFN, with what its branch keeps: ``x`` (T, H) -> (D·I + n·k,), dense tokens first."""
    if masked := masked_by(outer):
        return masked.up(x, tokens, chosen)
    base: FrozenLinear = base_linear(outer)
    low, b = low_rank_update(outer, x)
    return ffn_up(x, base.stored, tokens.dense, tokens.context, chosen, bias=base.bias, low=low, b=b)


def project_down(outer: nn.Module, dense: Tensor, context: Tensor, tokens: TokenPartition, channels: Tensor) -> Tensor:
    """The down matrix, with what its branch keeps: ``dense`` (n, I) and ``context`` (m, k) -> (T, H)."""
    if masked := masked_by(outer):
        return masked.down(dense, context, tokens, channels)
    base: FrozenLinear = base_linear(outer)
    low_dense, low_context, b = kept_update(outer, dense, context, channels)
    return ffn_down(
        dense,
        context,
        base.stored,
        tokens.dense,
        tokens.context,
        channels,
        tokens.tokens,
        bias=base.bias,
        low_dense=low_dense,
        low_context=low_context,
        b=b,
    )


def project(module: nn.Module, x: Tensor, lists: dict[str, Tensor]) -> Tensor:
    """The frozen linear for these tokens and channels, and every branch whole: (T, in) -> (T, out)."""
    base: FrozenLinear = base_linear(module)
    y = lora_linear(compute_input(x), base.stored, base.bias, transposed=base.transposed, **lists)
    low, b = low_rank_update(module, x)
    return y if low is None or b is None else torch.addmm(y, low, b.t())
