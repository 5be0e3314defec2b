"""The gated FFN of a sparse layer: ``down(act(gate(x)) * up(x))``, kept neurons only for context tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from sparselora_kernels import indexed_linear, join_rows, select_channels, split_rows

from ..sync.masks import Site
from .context import MicroBatch, SparseContext
from .estimator import FFNEstimator
from .linear import FrozenLinear, compute_input
from .lora import active_branches, base_linear, cast_input


class SparseFFN(nn.Module):
    """Takes the place of a family's gated MLP and keeps its children under their names.

    Dense tokens go through the children unchanged. For context tokens the intermediate is ``keep`` neurons wide. With
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
        batch = self.context.active()
        if batch is None:
            return self._dense(x)
        assert batch.partition is not None
        flat = x.reshape(-1, x.shape[-1])
        self.context.choose(batch, self.site, ("ffn",), lambda: self._select(flat, batch))
        rows = batch.partition.dense, batch.partition.context
        x_dense, x_context = split_rows(flat, *rows)
        y_dense = self._dense(x_dense)
        y_context = self._sparse(x_context, batch.masks[self.site.layer, "ffn"])
        return join_rows(y_dense, y_context.to(y_dense.dtype), *rows, flat.shape[0]).view_as(x)

    def _select(self, x: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        assert batch.partition is not None
        sums = self.estimator(x, batch.partition.context)
        return {"ffn": select_channels(self.context.sync.reduce(self.site, sums), self.keep)}

    def _dense(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def _sparse(self, x: Tensor, channels: Tensor) -> Tensor:
        if self.lora_branch == "dense" and any(
            next(active_branches(module), None) for module in (self.gate_proj, self.up_proj, self.down_proj)
        ):
            return self._sparse_with_dense_lora(x, channels)
        hidden = self.act_fn(self._widen(self.gate_proj, x, channels)) * self._widen(self.up_proj, x, channels)
        down: FrozenLinear = base_linear(self.down_proj)
        y = down.rows(hidden, channels)
        for branch in active_branches(self.down_proj):
            wide = compute_input(branch.dropout(cast_input(hidden, branch)))
            kept = indexed_linear(wide, branch.a.weight.t(), None, channels, transposed=True)
            y = y + branch.b(kept) * branch.scaling
        return y

    def _widen(self, module: nn.Module, x: Tensor, channels: Tensor) -> Tensor:
        """gate or up at the kept neurons, base and LoRA: (T, H) -> (T, k)."""
        base = base_linear(module)
        x = compute_input(x)
        y = indexed_linear(x, base.weight, base.bias, channels)
        for branch in active_branches(module):
            low = branch.a(branch.dropout(cast_input(x, branch)))
            update = indexed_linear(low, branch.b.weight, None, channels)
            if branch.b.bias is not None:  # PEFT's lora_bias, which is trained.
                update = update + branch.b.bias.index_select(0, channels)
            y = y + update * branch.scaling
        return y.to(x.dtype)

    def _sparse_with_dense_lora(self, x: Tensor, channels: Tensor) -> Tensor:
        """The paper's form: dropped neurons keep their LoRA contribution, so the intermediate is full width."""
        x = compute_input(x)
        wide = []
        for module in (self.gate_proj, self.up_proj):
            base = base_linear(module)
            kept = indexed_linear(x, base.weight, base.bias, channels)
            y = kept.new_zeros(x.shape[0], base.out_features).index_copy(1, channels, kept)
            wide.append((y + self._lora(module, x)).to(x.dtype))
        hidden = self.act_fn(wide[0]) * wide[1]
        down: FrozenLinear = base_linear(self.down_proj)
        return down.rows(hidden.index_select(1, channels), channels) + self._lora(self.down_proj, hidden)

    @staticmethod
    def _lora(module: nn.Module, x: Tensor) -> Tensor | float:
        branches = [b.b(b.a(b.dropout(cast_input(x, b)))) * b.scaling for b in active_branches(module)]
        return sum(branches) if branches else 0.0
