"""The gated FFN of a sparse layer: ``down(act(gate(x)) * up(x))``, kept neurons only for context tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from sparselora_kernels import indexed_linear, join_rows, select_channels, split_linear, split_rows

from ..sync.masks import Site
from .context import MicroBatch, SparseContext
from .estimator import FFNEstimator
from .frozen import FrozenLinear, compute_input
from .lora import LoRABranch, active_branches, base_linear, cast_input

Pair = tuple[Tensor, Tensor]
"""Dense tokens, context tokens."""


class SparseFFN(nn.Module):
    """Takes the place of a family's gated MLP and keeps its children under their names.

    Its frozen children are :class:`FrozenLinear`. For context tokens the intermediate is ``keep`` neurons wide. With
    ``lora_branch="kept"`` a dropped neuron is dropped whole, the LoRA contribution of gate, up and down included;
    with ``"dense"`` (the paper) only the frozen branch is sparse and the intermediate is as wide as the LoRA branch.
    """

    def __init__(
        self,
        mlp: nn.Module,
        *,
        estimator: FFNEstimator,
        context: SparseContext,
        layer: int,
        keep: int,
        lora_branch: Literal["kept", "dense"],
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.estimator = estimator
        self.context = context
        self.site = Site(layer, "ffn")
        self.keep = keep
        self.lora_branch = lora_branch
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., H) -> (..., H)."""
        batch = self.context.active(self.site.layer, "ffn")
        if batch is None:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        assert batch.partition is not None
        flat = x.reshape(-1, x.shape[-1])
        self.context.choose(batch, self.site, ("ffn",), lambda: self._select(flat, batch))
        rows = batch.partition.dense, batch.partition.context
        dense, context = self._split(split_rows(flat, *rows), batch.masks[self.site.layer, "ffn"])
        return join_rows(dense, context.to(dense.dtype), *rows, flat.shape[0]).view_as(x)

    def _select(self, x: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        assert batch.partition is not None
        sums = self.estimator(x, batch.partition.context)
        keep = self.context.keep(self.site.layer, "ffn", self.keep)
        return {"ffn": select_channels(self.context.sync.reduce(self.site, sums), keep)}

    def _split(self, x: Pair, channels: Tensor) -> Pair:
        """Both kinds of tokens through the FFN; every frozen weight is read (and decoded) once for both."""
        wide = self.lora_branch == "dense" and any(
            next(active_branches(module), None) for module in (self.gate_proj, self.up_proj, self.down_proj)
        )
        gate, up = (self._widen(module, x, channels, wide=wide) for module in (self.gate_proj, self.up_proj))
        dense, context = self.act_fn(gate[0]) * up[0], self.act_fn(gate[1]) * up[1]
        return self._narrow((dense, context), channels, wide=wide)

    def _widen(self, module: nn.Module, x: Pair, channels: Tensor, *, wide: bool) -> Pair:
        """gate or up, base and LoRA: (D, H), (T, H) -> (D, I), (T, k); (T, I) where ``wide``."""
        base: FrozenLinear = base_linear(module)
        x_dense, x_context = (compute_input(part) for part in x)
        dense, context = split_linear(x_dense, x_context, base.stored, base.bias, channels)
        if wide:
            context = context.new_zeros(context.shape[0], base.out_features).index_copy(1, channels, context)
        for branch in active_branches(module):
            dense = dense + _lora(branch, x_dense)
            context = context + (_lora(branch, x_context) if wide else _kept_rows(branch, x_context, channels))
        return dense.to(x_dense.dtype), context.to(x_context.dtype)

    def _narrow(self, hidden: Pair, channels: Tensor, *, wide: bool) -> Pair:
        """down, base and LoRA: (D, I), (T, k), or (T, I) where ``wide`` -> (D, H), (T, H)."""
        base: FrozenLinear = base_linear(self.down_proj)
        dense_in, context_in = (compute_input(part) for part in hidden)
        kept = context_in.index_select(1, channels) if wide else context_in
        dense, context = split_linear(dense_in, kept, base.stored, base.bias, channels, transposed=True)
        for branch in active_branches(self.down_proj):
            dense = dense + _lora(branch, dense_in)
            context = context + (_lora(branch, context_in) if wide else _kept_columns(branch, context_in, channels))
        return dense.to(dense_in.dtype), context


def _lora(branch: LoRABranch, x: Tensor) -> Tensor:
    """The whole branch, as PEFT computes it."""
    return branch.b(branch.a(branch.dropout(cast_input(x, branch)))) * branch.scaling


def _kept_rows(branch: LoRABranch, x: Tensor, channels: Tensor) -> Tensor:
    """The branch of gate or up at the kept neurons: (T, H) -> (T, k)."""
    low = branch.a(branch.dropout(cast_input(x, branch)))
    update = indexed_linear(low, branch.b.weight, None, channels)
    if branch.b.bias is not None:  # PEFT's lora_bias, which is trained.
        update = update + branch.b.bias.index_select(0, channels)
    return update * branch.scaling


def _kept_columns(branch: LoRABranch, hidden: Tensor, channels: Tensor) -> Tensor:
    """The branch of down from the kept neurons: (T, k) -> (T, H)."""
    kept = compute_input(branch.dropout(cast_input(hidden, branch)))
    return branch.b(indexed_linear(kept, branch.a.weight.t(), None, channels, transposed=True)) * branch.scaling
