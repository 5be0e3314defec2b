"""The routed experts of a sparse layer: of every expert its own kept neurons, for the context tokens routed to it.

A bank of E experts of W neurons is an FFN of E·W neurons, of which a token sees those of its experts, and whose hidden
values carry the router's weight: ``y_t = Σ_k down_e(w_t,k · gate(gate_up_e(x_t)))``. That is how it is computed, with the
weight on the narrow side, how it is scored, and what is dropped. The router, its loss and the block around it are the
family's own and run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparselora_kernels import (
    Pairs,
    collect,
    expert_pairs,
    gated_product,
    grouped_linear,
    grouped_product,
    select_grouped,
    spread,
)

from ..codecs.linear import FrozenMatrix, compute_input
from ..layouts import Experts, combined
from ..sync.masks import Site
from .context import SparseContext
from .estimator import ExpertsEstimator
from .lora import active_branches
from .micro_batch import MicroBatch
from .traced import Handle, kept

BIASES = ("gate_up_proj_bias", "down_proj_bias")
GROUP = "experts"


class SparseExperts(nn.Module):
    """Takes the place of a family's module of experts.

    Its frozen matrices are stored with a neuron as a row: ``gate_up_proj`` (E·2W, H), of each expert the rows of gate and
    then those of up, and ``down_proj`` (E·W, H), transposed. Biases stay as the family has them. For context tokens an
    expert is ``keep`` neurons wide; ``lora_branch`` is as in :class:`~.ffn.SparseFFN`, for adapters on the parameters.

    Args:
        family: the module whose place it takes; it has given up its parameters, and gives its ``_apply_gate``.
        layout: where it is, and how the family lays the matrices out.
        gate_up, down: the frozen matrices.
        estimator: ``None``: all tokens are computed whole.
    """

    gathers_together: ClassVar[bool] = True
    """It reads its children's weights itself."""
    is_sparse_experts: ClassVar[bool] = True
    """For who looks for the experts of a layer."""

    def __init__(
        self,
        family: nn.Module,
        layout: Experts,
        gate_up: FrozenMatrix,
        down: FrozenMatrix,
        *,
        context: SparseContext,
        layer: int,
        estimator: ExpertsEstimator | None = None,
        keep: int = 0,
        lora_branch: Literal["kept", "dense"] = "kept",
    ) -> None:
        super().__init__()
        self.__dict__["family"] = family  # Not a child: it holds nothing.
        self.layout = layout
        self.gate_up_proj = gate_up
        self.down_proj = down
        for name in BIASES:
            self.register_parameter(name, family._parameters.get(name))
        self.estimator = estimator
        self.context = context
        self.site = Site(layer, "experts")
        self.keep = keep
        self.lora_branch = lora_branch
        self.handle = Handle(self)
        self.train(family.training)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """``x`` (..., H), ``chosen`` (T, K) experts and their ``weights`` (T, K) -> (..., H)."""
        flat = compute_input(x).reshape(-1, x.shape[-1])
        chosen, weights = (given.reshape(flat.shape[0], -1) for given in (chosen, weights))
        # An expert past the last is the families' way to say that a slot is empty.
        weights = weights.masked_fill(chosen >= self.layout.count, 0.0)
        chosen = chosen.clamp(max=self.layout.count - 1)
        batch = None if self.estimator is None else self.context.active(self.site.layer, GROUP)
        if batch is None:
            everyone = torch.arange(flat.shape[0], device=flat.device)
            y = collect(*self._compute(flat, chosen, weights, everyone))
            return y.view(x.shape)
        assert batch.partition is not None
        tokens = batch.partition
        if tokens.tokens != flat.shape[0]:
            raise RuntimeError(
                f"layer {self.site.layer}: the experts were given {flat.shape[0]} tokens, where the forward has "
                f"{tokens.tokens}: this family's block drops or repeats tokens before its experts, so they must be dense"
            )
        given = flat, chosen, weights
        finish, channels = None, None
        if torch.compiler.is_compiling():
            length = self.layout.count * self.context.keep(self.site.layer, GROUP, self.keep)
            channels = kept(self.handle, GROUP, list(given), batch, length)
        else:
            finish = self._choose(given, batch)
        out = flat.new_zeros(flat.shape)
        if tokens.dense.numel():
            out.index_copy_(0, tokens.dense, collect(*self._compute(*given, tokens.dense)))
        if finish is not None:  # The ranks' scores were on their way.
            finish()
        if channels is None:
            channels = batch.masks[self.site.layer, GROUP]
        out.index_copy_(0, tokens.context, collect(*self._compute(*given, tokens.context, channels)))
        return out.view(x.shape)

    # --- which channels

    def kept(self, role: str, x: list[Tensor], batch: MicroBatch) -> Tensor:
        """The kept channels, (E·k,) int64: expert e's are in [e·W, (e+1)·W)."""
        flat, chosen, weights = x
        if finish := self._choose((flat, chosen, weights), batch):
            finish()
        return batch.masks[self.site.layer, GROUP]

    def _choose(self, given: tuple[Tensor, Tensor, Tensor], batch: MicroBatch) -> Callable[[], None] | None:
        return self.context.choose(batch, self.site, (GROUP,), lambda: self._select(*given, batch))

    def _select(self, x: Tensor, chosen: Tensor, weights: Tensor, batch: MicroBatch) -> Callable[[], dict[str, Tensor]]:
        assert batch.partition is not None and self.estimator is not None
        sync, layout = self.context.sync, self.layout
        pairs = expert_pairs(chosen, batch.partition.context, layout.count)
        biases = None
        if self.gate_up_proj_bias is not None:
            both = layout.first_last(self.gate_up_proj_bias).unflatten(1, (2, layout.width))
            biases = both[:, 0].flatten(), both[:, 1].flatten()
        scores = self.estimator(spread(x, pairs), pairs, _by_pair(weights, pairs), self._combine, biases)
        reduction = sync.start(self.site, *scores)

        def masks() -> dict[str, Tensor]:
            keep = self.context.keep(self.site.layer, GROUP, self.keep)
            (sums,) = reduction.wait()
            channels, flag = select_grouped(sums, layout.count, keep)
            sync.watch(self.site, flag)
            return {GROUP: channels}

        return masks

    # --- the products

    def _compute(
        self, x: Tensor, chosen: Tensor, weights: Tensor, rows: Tensor, channels: Tensor | None = None
    ) -> tuple[Tensor, Pairs]:
        """The experts of the tokens ``rows``: (S, H) by pair, weighted, and the pairs."""
        pairs = expert_pairs(chosen, rows, self.layout.count)
        ends, inputs, by_pair = pairs.ends, spread(x, pairs), _by_pair(weights, pairs)
        branches = [_branches(wrapper, self.layout, x.dtype) for wrapper in self.layout.wrappers]
        in_up = [b for name, found in branches if name == "gate_up_proj" for b in found]
        in_down = [b for name, found in branches if name == "down_proj" for b in found]
        whole = channels is not None and self.lora_branch == "dense" and bool(in_up or in_down)
        local = None if channels is None else self._local(channels)
        twice = None if local is None else torch.cat((local, local + self.layout.width), 1)

        both = grouped_linear(inputs, self.gate_up_proj.stored, ends, None if twice is None else self._rows(twice))
        if self.gate_up_proj_bias is not None:
            bias = self.layout.first_last(self.gate_up_proj_bias).to(both.dtype)
            both = both + (bias if twice is None else bias.gather(1, twice)).index_select(0, pairs.experts)
        if whole:  # The frozen branch alone is narrow.
            assert twice is not None
            wide = both.new_zeros(both.shape[0], 2 * self.layout.width)
            both = wide.scatter(1, twice.index_select(0, pairs.experts), both)
        for a, b, scaling in in_up:
            b = b if twice is None or whole else b.gather(1, twice[:, :, None].expand(-1, -1, b.shape[2]))
            both = both + grouped_product(grouped_product(inputs, a, ends) * scaling, b, ends)

        gate, up = both.chunk(2, -1)
        hidden = (self._combine(gate, up) * by_pair[:, None]).to(x.dtype)

        narrow = hidden
        if whole:
            assert local is not None
            narrow = hidden.gather(1, local.index_select(0, pairs.experts))
        y = grouped_linear(narrow, self.down_proj.stored, ends, channels, transposed=True)
        for a, b, scaling in in_down:
            a = a if local is None or whole else a.gather(2, local[:, None].expand(-1, a.shape[1], -1))
            y = y + grouped_product(grouped_product(hidden, a, ends) * scaling, b, ends)
        if self.down_proj_bias is not None:
            bias = self.down_proj_bias.index_select(0, pairs.experts) * by_pair[:, None]
            y = y + bias.to(y.dtype)
        return y, pairs

    def _combine(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.layout.activation is not None:
            return gated_product(gate, up, self.layout.activation)
        return combined(self.family, None, self.layout.interleaved)(gate, up)

    def _local(self, channels: Tensor) -> Tensor:
        """(E·k,) rows of ``down_proj`` -> (E, k) neurons of each expert."""
        count, width = self.layout.count, self.layout.width
        return channels.view(count, -1) - width * torch.arange(count, device=channels.device)[:, None]

    def _rows(self, local: Tensor) -> Tensor:
        """(E, n) rows of each expert's gate and up -> (E·n,) rows of ``gate_up_proj``."""
        first = 2 * self.layout.width * torch.arange(self.layout.count, device=local.device)
        return (local + first[:, None]).flatten()

    # --- the family's own module

    def own_values(self) -> dict[str, Tensor]:
        """The parameters as the family has them; raises ValueError where they are not whole and plain."""
        for matrix in (self.gate_up_proj, self.down_proj):
            if matrix.obstacle:
                raise ValueError(matrix.obstacle)
        values = {
            "gate_up_proj": self.layout.gate_up_family(self.gate_up_proj.parts[0].detach()),
            "down_proj": self.layout.down_family(self.down_proj.parts[0].detach()),
        }
        return values | {name: p for name in BIASES if (p := self._parameters[name]) is not None}

    def take(self, values: dict[str, Tensor]) -> None:
        """Store parameters as the family has them."""
        with torch.no_grad():
            self.gate_up_proj.parts[0].copy_(self.layout.gate_up_rows(values["gate_up_proj"]))
            self.down_proj.parts[0].copy_(self.layout.down_rows(values["down_proj"]))

    def extra_repr(self) -> str:
        layout = self.layout
        return f"experts={layout.count}, width={layout.width}, hidden={layout.hidden}, keep={self.keep}"


def _by_pair(weights: Tensor, pairs: Pairs) -> Tensor:
    """(T, K) -> (S,)."""
    return weights.index_select(0, pairs.rows).flatten().index_select(0, pairs.order)


def _branches(wrapper: Any, layout: Experts, dtype: torch.dtype) -> tuple[str, list[tuple[Tensor, Tensor, float]]]:
    """Of PEFT's wrapper of a parameter: its name, and ``A`` (E, r, in), ``B`` (E, out, r) and the scaling of what is
    active. PEFT computes with them in the weight's dtype."""
    found = []
    for branch in active_branches(wrapper):
        a, b = branch.a.weight, branch.b.weight
        b = b.view(b.shape[0], -1, layout.count).permute(2, 0, 1)
        if wrapper.parameter_name == "gate_up_proj":
            b = layout.first_last(b)
        found.append((a.view(layout.count, -1, a.shape[1]).to(dtype), b.to(dtype), branch.scaling))
    return wrapper.parameter_name, found


class ThroughWrappers:
    """Takes the place of ``forward`` of PEFT's outermost wrapper: the experts compute the branches themselves, and no
    weight with its update added is made.

    An object, so that it is copied with its model.
    """

    def __init__(self, outer: Any, experts: SparseExperts) -> None:
        self.outer, self.experts = outer, experts

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.outer._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        for wrapper in self.experts.layout.wrappers:
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()
        return self.experts(x, *args, **kwargs)


class MergingExperts:
    """Takes the place of a wrapper's ``merge`` or ``unmerge``: PEFT's own, on the parameters as the family has them."""

    def __init__(self, wrapper: Any, method: str, experts: SparseExperts, explain: Callable[[str], str]) -> None:
        self.wrapper, self.method, self.experts, self.explain = wrapper, method, experts, explain

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        experts, family = self.experts, self.experts.family
        try:
            values = experts.own_values()
        except ValueError as error:
            raise ValueError(self.explain(str(error))) from None
        for name, value in values.items():
            family._parameters[name] = nn.Parameter(value, requires_grad=False)
        experts.layout.replace(family)
        try:
            getattr(type(self.wrapper), self.method)(self.wrapper, *args, **kwargs)
        finally:  # What was merged before an error is merged.
            experts.layout.replace(experts)
            experts.take({name: family._parameters[name] for name in ("gate_up_proj", "down_proj")})
            for name in values:
                family._parameters[name] = None
