"""LoRA layers on a pruned matrix: what they compute, and what is merged, keeps its zeros.

    Ŵ = (W + s·B·A) ⊙ (W ≠ 0)

The mask is read from the frozen matrix in every product (:mod:`sparselora_kernels.masked_linear`): nothing is stored, shared
or sent for it.
"""

from __future__ import annotations

from typing import Any, Literal

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sparselora_kernels import masked_down, masked_linear, masked_up, nonzero

from ..codecs.linear import Branch, FrozenLinear, compute_input
from ..method.tokens import TokenPartition
from ..sharding.parameters import is_dtensor
from .lora import LoRABranch, active_branches

Gradient = Literal["exact", "straight_through"]


class MaskedLoRA:
    """Takes the place of ``forward`` of one PEFT layer on a pruned base. An object, so that it is copied with its model.

    Args:
        layer: on a frozen base that is ours or a plain linear.
        name: of the layer, for errors.
        gradient: see :func:`sparselora_kernels.masked_linear`.
    """

    def __init__(self, layer: LoraLayer, name: str, gradient: Gradient) -> None:
        self.layer, self.name, self.gradient = layer, name, gradient

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise ValueError(
                f"{self.name} is masked (sparse_base): it takes one adapter for all rows, no adapter_names"
            )
        base, factors = self.layer.base_layer, self.factors()
        if factors is None:
            return base(x)
        x = compute_input(x)
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(base, FrozenLinear):
            options = {**base.lists(flat), "transposed": base.transposed}
            y = masked_linear(flat, base.stored, *factors, base.bias, gradient=self.gradient, **options)
        else:
            y = masked_linear(flat, base.weight, *factors, base.bias, gradient=self.gradient)
        return y.view(*x.shape[:-1], y.shape[-1])

    def up(self, x: Tensor, tokens: TokenPartition, chosen: Any) -> Tensor:
        """As the first matrix of an FFN: ``x`` (T, H) -> (D·I + n·k,), see :func:`sparselora_kernels.ffn_up`."""
        base, factors = self.layer.base_layer, self.factors()
        assert factors is not None
        lists = tokens.dense, tokens.context, chosen
        return masked_up(x, base.stored, *factors, *lists, bias=base.bias, gradient=self.gradient)

    def down(self, dense: Tensor, context: Tensor, tokens: TokenPartition, channels: Tensor) -> Tensor:
        """As the last: ``dense`` (D, I) and ``context`` (n, k) -> (T, H)."""
        base, factors = self.layer.base_layer, self.factors()
        assert factors is not None
        lists = tokens.dense, tokens.context, channels, tokens.tokens
        return masked_down(dense, context, base.stored, *factors, *lists, bias=base.bias, gradient=self.gradient)

    def factors(self) -> Branch | None:
        """Of the adapter that is active now; ``None`` where it is switched off or merged.

        Raises:
            ValueError: it cannot be masked, or is sharded apart from its layer.
        """
        branches = list(active_branches(self.layer))
        if not branches:
            return None
        if reason := obstacle(branches):
            raise ValueError(f"{self.name} is masked (sparse_base), but {reason}")
        branch = branches[0]
        if is_dtensor(branch.a.weight) or is_dtensor(branch.b.weight):
            raise ValueError(
                f"{self.name} is masked (sparse_base): its adapter cannot be sharded by itself; fully_shard whole decoder "
                "layers"
            )
        return branch.a.weight, branch.b.weight, branch.scaling


def obstacle(branches: list[LoRABranch]) -> str | None:
    """Why these branches of one layer cannot be masked; ``None`` where they can."""
    if len(branches) > 1:
        return f"{len(branches)} adapters are active: one"
    branch = branches[0]
    if getattr(branch.dropout, "p", 0.0) > 0:
        return f"its adapter drops inputs (lora_dropout {branch.dropout.p}), which one product of one matrix cannot: 0"
    if branch.b.bias is not None:
        return "its adapter has a bias of its own (lora_bias), which no mask can keep out of pruned rows: false"
    return None


def masked_by(module: nn.Module) -> MaskedLoRA | None:
    """What masks a LoRA layer with an active adapter now."""
    found = module.__dict__.get("forward")
    found = getattr(found, "own", found)  # Behind a plain FFN's.
    return found if isinstance(found, MaskedLoRA) and found.factors() is not None else None


class MaskedDelta:
    """Takes the place of PEFT's ``get_delta_weight``, by which it merges and takes out: zero where the base is.

    A sum can be exactly zero where neither was: such positions are remembered until the adapter is taken out again.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.lost: Tensor | None = None

    def __call__(self, adapter: str) -> Tensor:
        delta = type(self.layer).get_delta_weight(self.layer, adapter)
        weight: Tensor = self.layer.get_base_layer().weight
        kept = nonzero(weight.detach())
        if self.lost is not None:
            kept.view(-1)[self.lost] = True
            self.lost = None
        else:
            # PEFT adds in either dtype.
            sums = (weight.detach() + delta).to(weight.dtype), weight.detach() + delta.to(weight.dtype)
            self.lost = (kept & ((sums[0] == 0) | (sums[1] == 0))).view(-1).nonzero().flatten()
        return delta.masked_fill_(~kept, 0)


def mask_lora(layer: LoraLayer, name: str, gradient: Gradient) -> None:
    """Compute a LoRA layer with the mask of its base, and merge it so."""
    layer.__dict__["forward"] = MaskedLoRA(layer, name, gradient)
    mask_delta(layer)


def mask_delta(layer: LoraLayer) -> None:
    """Merge a LoRA layer with the mask of its base."""
    layer.__dict__["get_delta_weight"] = MaskedDelta(layer)


def unmask_lora(layer: LoraLayer) -> None:
    """Undo :func:`mask_lora`."""
    for name in ("forward", "get_delta_weight"):
        layer.__dict__.pop(name, None)
