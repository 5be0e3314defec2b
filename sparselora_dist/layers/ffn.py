"""The gated FFN of a sparse layer: ``down(act(gate(x)) * up(x))``, kept neurons only for context tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sparselora_kernels import ffn_down, gated_product, gated_up, lora_linear, select_checked
from sparselora_kernels.activations import activation_name

from ..codecs.linear import FrozenLinear, compute_input
from ..layouts import base_linear
from ..method.tokens import TokenPartition
from ..sync.masks import Site
from .context import SparseContext
from .estimator import FFNEstimator
from .lora import active_branches, kept_update, low_rank_update
from .micro_batch import MicroBatch
from .traced import Handle, kept

Chosen: TypeAlias = "Tensor | Callable[[], Tensor]"
"""Kept channels; or what waits for the other ranks' scores and gives them, always the same."""


def _known(chosen: Chosen) -> Tensor:
    return chosen if isinstance(chosen, Tensor) else chosen()


class SparseFFN(nn.Module):
    """Takes the place of a family's gated MLP and keeps its children under their names (``family_names``).

    Its frozen children are :class:`FrozenLinear`. For context tokens the intermediate is ``keep`` neurons wide. With
    ``lora_branch="kept"`` a dropped neuron is dropped whole, the LoRA contribution of gate, up and down included;
    with ``"dense"`` (the paper) only the frozen branch is sparse and the intermediate is as wide as the LoRA branch.
    """

    gathers_together: ClassVar[bool] = True
    """It reads its children's weights itself, for dense and context tokens at once."""

    def __init__(
        self,
        mlp: nn.Module,
        names: dict[str, str],
        activation: Callable[[Tensor], Tensor],
        *,
        estimator: FFNEstimator,
        context: SparseContext,
        layer: int,
        keep: int,
        lora_branch: Literal["kept", "dense"],
    ) -> None:
        super().__init__()
        self.family_names = names
        for own in names.values():
            setattr(self, own, getattr(mlp, own))
        self.act_fn = activation
        name = activation_name(activation)
        assert name is not None, activation  # The layout was checked.
        self.activation = name
        self.estimator = estimator
        self.context = context
        self.site = Site(layer, "ffn")
        self.keep = keep
        self.lora_branch = lora_branch
        self.handle = Handle(self)
        self.train(mlp.training)

    @property
    def projections(self) -> tuple[Any, Any, Any]:
        """Gate, up and down, in their LoRA layers where they carry adapters."""
        gate, up, down = (getattr(self, own) for own in self.family_names.values())
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., H) -> (..., H)."""
        batch = self.context.active(self.site.layer, "ffn")
        if batch is None:
            gate, up, down = self.projections
            return down(gated_product(gate(x), up(x), self.activation))
        assert batch.partition is not None
        flat = compute_input(x).reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            keep = self.context.keep(self.site.layer, "ffn", self.keep)
            channels: Chosen = kept(self.handle, "ffn", flat, batch, keep)
        else:
            channels = self._choose(flat, batch)
        compute = self._whole_branch if self._branch_is_whole else self._kept
        return compute(flat, batch.partition, channels).view(*x.shape[:-1], -1)

    def _choose(self, x: Tensor, batch: MicroBatch) -> Chosen:
        finish = self.context.choose(batch, self.site, ("ffn",), lambda: self._select(x, batch))

        def later() -> Tensor:
            assert finish is not None
            finish()
            return batch.masks[self.site.layer, "ffn"]

        return later if finish else batch.masks[self.site.layer, "ffn"]

    def kept(self, role: str, x: Tensor, batch: MicroBatch) -> Tensor:
        """The kept neurons, (k,) int64; ``x`` (T, H) is read where the mask is new."""
        return _known(self._choose(x, batch))

    def _select(self, x: Tensor, batch: MicroBatch) -> Callable[[], dict[str, Tensor]]:
        assert batch.partition is not None
        sync = self.context.sync
        reduction = sync.start(self.site, *self.estimator(x, batch.partition.context))

        def masks() -> dict[str, Tensor]:
            keep = self.context.keep(self.site.layer, "ffn", self.keep)
            (sums,) = reduction.wait()
            channels, flag = select_checked(sums, keep)
            sync.watch(self.site, flag)
            return {"ffn": channels}

        return masks

    @property
    def _branch_is_whole(self) -> bool:
        modules = self.projections
        return self.lora_branch == "dense" and any(next(active_branches(module), None) for module in modules)

    def _kept(self, x: Tensor, tokens: TokenPartition, chosen: Chosen) -> Tensor:
        """``x`` (T, H) -> (T, H), the intermediate of context tokens as wide as what is ``chosen``; dense tokens are
        computed while the ranks' scores are on their way."""
        outer = self.projections
        gate, up, down = (base_linear(module) for module in outer)
        gate_low, gate_b = low_rank_update(outer[0], x)
        up_low, up_b = low_rank_update(outer[1], x)
        hidden = gated_up(
            x,
            gate.stored,
            up.stored,
            tokens.dense,
            tokens.context,
            chosen,
            gate_bias=gate.bias,
            up_bias=up.bias,
            gate_low=gate_low,
            gate_b=gate_b,
            up_low=up_low,
            up_b=up_b,
            activation=self.activation,
        )
        channels = _known(chosen)
        low_dense, low_context, b = kept_update(outer[2], *hidden, channels)
        return ffn_down(
            *hidden,
            down.stored,
            tokens.dense,
            tokens.context,
            channels,
            x.shape[0],
            bias=down.bias,
            low_dense=low_dense,
            low_context=low_context,
            b=b,
        )

    def _whole_branch(self, x: Tensor, tokens: TokenPartition, chosen: Chosen) -> Tensor:
        """``x`` (T, H) -> (T, H), sparse in the frozen branch alone."""
        lists = {"dense_rows": tokens.dense, "context_rows": tokens.context, "channels": _known(chosen)}
        gate, up, down = self.projections
        inner = self.act_fn(_project(gate, x, lists)) * _project(up, x, lists)
        return _project(down, inner, lists)


def _project(module: nn.Module, x: Tensor, lists: dict[str, Tensor]) -> Tensor:
    """The frozen linear for these tokens and channels, and every branch whole: (T, in) -> (T, out)."""
    base: FrozenLinear = base_linear(module)
    y = lora_linear(compute_input(x), base.stored, base.bias, transposed=base.transposed, **lists)
    low, b = low_rank_update(module, x)
    return y if low is None or b is None else torch.addmm(y, low, b.t())
