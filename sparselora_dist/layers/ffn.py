"""The gated FFN of a sparse layer: ``down(act(gate(x)) * up(x))``, kept neurons only for context tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparselora_kernels import Weight, gated_product, gated_up, rows_of
from sparselora_kernels.activations import activation_name

from ..codecs.linear import compute_input
from ..layouts import Parts, base_linear
from ..method.tokens import TokenPartition
from .context import SparseContext
from .estimator import FFNEstimator
from .lora import low_rank_update
from .masked import masked_by
from .neurons import Chosen, NeuronChooser, known, project, project_down, project_up, rows_and_channels

_GATED = ("gate_proj", "up_proj")


class SparseFFN(NeuronChooser, nn.Module):
    """Takes the place of a family's gated MLP and keeps its children under their names (``family_names``).

    Gate and up may be halves of one matrix (``family_parts``): then they share the first product of its LoRA branch.
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
        parts: Parts,
        activation: Callable[[Tensor], Tensor],
        *,
        estimator: FFNEstimator,
        context: SparseContext,
        layer: int,
        keep: int,
        lora_branch: Literal["kept", "dense"],
    ) -> None:
        super().__init__()
        self.family_names, self.family_parts = names, parts
        for own in names.values():
            setattr(self, own, getattr(mlp, own))
        self.act_fn = activation
        name = activation_name(activation)
        assert name is not None, activation  # The layout was checked.
        self.activation = name
        self._halves = [self._half(name) for name in _GATED]
        self.estimator = estimator
        self.set_up(context, layer, keep, lora_branch)
        self.train(mlp.training)

    @property
    def projections(self) -> list[Any]:
        """Gate, up and down, or both in one and down, in their LoRA layers where they carry adapters."""
        return [getattr(self, own) for own in self.family_names.values()]

    def _half(self, name: str) -> tuple[int, slice | None]:
        """Which of :attr:`projections` holds gate or up, and its rows there; ``None`` where these are all."""
        stored, rows = self.family_parts[name]
        assert not isinstance(rows, Tensor)
        return list(self.family_names).index(stored), rows

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., H) -> (..., H)."""
        batch = self.context.active(self.site.layer, "ffn")
        if batch is None:
            *first, down = self.projections
            gate, up = self._gate_and_up([module(x) for module in first])
            return down(gated_product(gate, up, self.activation))
        assert batch.partition is not None
        flat = compute_input(x).reshape(-1, x.shape[-1])
        compute = self._whole_branch if self.branch_is_whole(*self.projections) else self._kept
        return compute(flat, batch.partition, self.neurons(flat, batch)).view(*x.shape[:-1], -1)

    def _gate_and_up(self, outputs: list[Tensor]) -> list[Tensor]:
        """From what the matrices before down gave."""
        return [outputs[i] if rows is None else outputs[i][..., rows] for i, rows in self._halves]

    def _kept(self, x: Tensor, tokens: TokenPartition, chosen: Chosen) -> Tensor:
        """``x`` (T, H) -> (T, H), the intermediate of context tokens as wide as what is ``chosen``; dense tokens are
        computed while the ranks' scores are on their way."""
        *first, outer = self.projections
        if any(map(masked_by, first)):
            return project_down(outer, *self._one_by_one(first, x, tokens, chosen), tokens, known(chosen))
        low = [low_rank_update(module, x) for module in first]
        gate, up = (_operands(first[i], low[i], rows) for i, rows in self._halves)
        hidden = gated_up(
            x,
            gate.weight,
            up.weight,
            tokens.dense,
            tokens.context,
            chosen,
            gate_bias=gate.bias,
            up_bias=up.bias,
            gate_low=gate.low,
            gate_b=gate.b,
            up_low=up.low,
            up_b=up.b,
            activation=self.activation,
        )
        return project_down(outer, *hidden, tokens, known(chosen))

    def _one_by_one(self, first: list[Any], x: Tensor, tokens: TokenPartition, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """What down is given, dense and context tokens apart, where a matrix before it is masked: each makes a matrix of
        its size for its product, and both at once would make two."""
        dense, context = tokens.dense.shape[0], tokens.context.shape[0]
        wide, kept, starts = [], [], self._starts(first)
        for module, at in zip(first, starts):
            # A function is called once the dense tokens are under way.
            of_matrix = partial(_at, chosen, at)
            flat = project_up(module, x, tokens, of_matrix if callable(chosen) else of_matrix())
            width = base_linear(module).out_features
            parts = flat.split([dense * width, flat.shape[0] - dense * width])
            wide.append(parts[0].view(dense, width))
            narrow = parts[1].view(context, len(at) * known(chosen).shape[0])
            kept.append(dict(zip(at, narrow.chunk(len(at), 1))))
        whole_gate, whole_up = self._gate_and_up(wide)
        kept_gate, kept_up = (kept[i][0 if rows is None else rows.start] for i, rows in self._halves)
        return (
            gated_product(whole_gate, whole_up, self.activation, compact=True),
            gated_product(kept_gate, kept_up, self.activation, compact=True),
        )

    def _starts(self, first: list[Any]) -> list[list[int]]:
        """For each matrix before down, the rows at which gate and up begin in it."""
        starts: list[list[int]] = [[] for _ in first]
        for i, rows in self._halves:
            starts[i].append(0 if rows is None else rows.start)
        return [sorted(at) for at in starts]

    def _whole_branch(self, x: Tensor, tokens: TokenPartition, chosen: Chosen) -> Tensor:
        """``x`` (T, H) -> (T, H), sparse in the frozen branch alone."""
        *first, down = self.projections
        lists = rows_and_channels(tokens, chosen)
        outputs = []
        for module, at in zip(first, self._starts(first)):
            outputs.append(project(module, x, {**lists, "channels": _at(lists["channels"], at)}))
        gate, up = self._gate_and_up(outputs)
        return project(down, self.act_fn(gate) * up, lists)


def _at(chosen: Chosen, starts: list[int]) -> Tensor:
    """The channels in a matrix that holds several things, from ``starts`` on."""
    own = [known(chosen) + start for start in starts]
    return own[0] if len(own) == 1 else torch.cat(own)


class _Operands(NamedTuple):
    """Gate or up."""

    weight: Weight
    bias: Tensor | None
    low: Tensor | None
    """(T, R) first product of its LoRA branch; gate and up in one matrix share it."""
    b: Tensor | None


def _operands(module: Any, low: tuple[Any, Any], rows: slice | None) -> _Operands:
    base, (first, b) = base_linear(module), low
    if rows is None:
        return _Operands(base.stored, base.bias, first, b)
    bias, b = (None if t is None else t[rows] for t in (base.bias, b))
    return _Operands(rows_of(base.stored, rows), bias, first, b)
