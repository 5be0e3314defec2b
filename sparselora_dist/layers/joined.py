"""q, k and v of one layer in one operation: they read the same input.

The family's attention calls the three one after another. The first call computes all of them; the other two take theirs,
if they come with the very same input. Whatever is unlike plain LoRA on all three goes the way of :mod:`.lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from sparselora_kernels import lora_joined, lora_order

from ..codecs.linear import FrozenLinear, compute_input
from ..sharding.parameters import is_zero3
from .context import SparseContext
from .lora import FusedLoRA


class JoinedLoRA:
    """What the LoRA layers q, k and v of one attention share.

    Args:
        layers: the three, each with its :class:`FusedLoRA`.
        context: says where q is asked for fewer positions than k and v.
        layer: number of the decoder layer.
    """

    def __init__(self, layers: Sequence[LoraLayer], context: SparseContext, layer: int) -> None:
        self.fused: list[FusedLoRA] = [module.__dict__["forward"] for module in layers]
        self.context, self.layer = context, layer
        self._waiting: tuple[Tensor, list[Tensor]] | None = None
        for number, module in enumerate(layers):
            module.__dict__["forward"] = _Member(self, number)

    def output(self, number: int, x: Tensor) -> Tensor | None:
        """The output of the layer ``number`` for an input (..., in); ``None`` where it is computed apart."""
        if torch.compiler.is_compiling():
            return None  # What is passed on from call to call is no part of a graph.
        if number == 0:
            outputs = self._together(x)
            self._waiting = None if outputs is None else (x, outputs)
        waiting = self._waiting
        if waiting is None or waiting[0] is not x:
            return None
        if number == len(self.fused) - 1:
            self._waiting = None
        return waiting[1][number]

    def _together(self, x: Tensor) -> list[Tensor] | None:
        """All three outputs (..., out_i); ``None`` where they cannot be joined."""
        if self.context.wanted(self.layer) is not None:
            return None
        bases = [fused.layer.base_layer for fused in self.fused]
        if any(is_zero3(p) for base in bases for p in base.parameters(recurse=False)):
            return None  # ZeRO-3 would gather k and v for the first call, and again for their own.
        compute = compute_input(x)
        branches = [fused.branch(compute) for fused in self.fused]
        if any(fused.merge for fused in self.fused) or not all(branches):
            return None
        weights = [factor.weight for branch in branches if branch for factor in (branch.a, branch.b)]
        if torch.is_grad_enabled() and not all(weight.requires_grad for weight in weights):
            return None
        flat = compute.reshape(-1, x.shape[-1])
        for branch in branches:
            assert branch is not None
            (rank, inputs), outputs = branch.a.weight.shape, branch.b.weight.shape[0]
            if lora_order(flat.shape[0], inputs, outputs, rank)[1] != "through_rank":
                return None
        ours = [base if isinstance(base, FrozenLinear) else None for base in bases]
        if any(base is not None and base.transposed for base in ours):
            return None
        lists = [{} if base is None else base.lists(flat) for base in ours]
        rows = next((found for found in lists if found), {})
        pairs = [(branch.a.weight, branch.b.weight) for branch in branches if branch]
        if len({factor.dtype for pair in pairs for factor in pair}) > 1:
            return None
        outputs = lora_joined(
            flat,
            [base.weight if own is None else own.stored for base, own in zip(bases, ours)],
            [base.bias for base in bases],
            [a for a, _ in pairs],
            [b for _, b in pairs],
            [branch.scaling for branch in branches if branch],
            dense_rows=rows.get("dense_rows"),
            context_rows=rows.get("context_rows"),
            channels=[found.get("channels") for found in lists],
        )
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class _Member:
    """Takes the place of ``forward`` of one of the three; an object, so that it is copied with its model."""

    def __init__(self, joined: JoinedLoRA, number: int) -> None:
        self.joined, self.number = joined, number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if args or kwargs else self.joined.output(self.number, x)
        return self.joined.fused[self.number](x, *args, **kwargs) if found is None else found
