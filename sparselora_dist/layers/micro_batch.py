"""What is kept of one forward of the model until its backward is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from ..method.tokens import TokenPartition

_numbers = count()


def _ticket() -> Tensor:
    return torch.full((1,), next(_numbers), dtype=torch.int64, device="cpu")


@dataclass(slots=True)
class MicroBatch:
    """One forward of the model."""

    partition: TokenPartition | None
    """``None``: everything is computed densely."""
    masks: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Kept channels, (k,) int64 ascending, by (layer, group)."""
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """What the kept channels own of a projection, int64 ascending, by (layer, role)."""
    inputs: dict[int, int] = field(default_factory=dict)
    """Address of each layer's input."""
    loss: LossPositions | None = None
    """Where the loss reads logits; ``None`` leaves the LM head whole."""
    last_layer: int | None = None
    """The decoder layer that computes q, o and FFN at ``loss`` only."""
    learns: bool = True
    """Whether it is a training forward with gradients."""
    ticket: Tensor = field(default_factory=_ticket)
    """(1,) int64 on the host, its own: how a compiled graph, which sees tensors only, says which forward it computes."""

    def lists(self) -> Iterator[Tensor]:
        """The tensors whose length depends on the labels."""
        if self.partition is not None:
            yield from (self.partition.dense, self.partition.context)
        if self.loss is not None:
            yield from (self.loss.rows, self.loss.labels)


@dataclass(slots=True)
class LossPositions:
    """The positions of one forward whose next token carries a label."""

    shape: torch.Size
    """(B, S) of the batch."""
    rows: Tensor
    """(n,) int64 flat positions."""
    labels: Tensor
    """(n,) int64, the label of each position's next token."""
    asked: Literal["rows", "sum", "scores"] = "rows"
    """What is read of the LM head, see :mod:`.logits`: logits of these rows, their loss, or how well each was met."""
    head: Literal["whole", "rows", "sum", "scores"] = "whole"
    """What it gave."""


@dataclass(frozen=True, slots=True)
class GivenTokens:
    """Labels for forwards whose caller does not pass any."""

    labels: Tensor
    """(B, S), -100 at context tokens; of the others only the tests for -100 are read unless ``packed``."""
    packed: bool = False
    """The LM head and the last layer are computed at label positions only, as where labels are passed."""

    def labels_of(self, tokens: Tensor | None) -> Tensor:
        """The labels of a forward that reads ``tokens``, (B, S) or (B, S, H).

        Raises:
            ValueError: they are of another shape.
        """
        if tokens is not None and tokens.shape[:2] != self.labels.shape:
            raise ValueError(
                f"sparse_tokens was given tokens of shape {tuple(self.labels.shape)}, and the model was called with "
                f"{tuple(tokens.shape[:2])} (rows, positions): open it around the forwards of that batch alone"
            )
        return self.labels


@dataclass(slots=True)
class TokenCounts:
    """Tokens of sparse training forwards."""

    dense: int = 0
    context: int = 0
    """Computed sparsely."""


class _Open:
    """Where a graph finds the positions of the forward that is running.

    A tensor that the tracer reaches through a module of PyTorch's own, as by a hook of the LM head, it takes for one of
    that module's properties, whose length never changes. This is reached through no module.
    """

    loss: LossPositions | None = None


OPEN = _Open()
