"""Token partition: dense, context and padding positions of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPartition:
    """Flat positions (``batch * sequence + t``) of one micro-batch, each ascending int64."""

    dense: Tensor
    """Positions that are computed whole: their own or the next position's label is trained on."""
    context: Tensor
    """The other real tokens: computed sparsely, and the ones that choose the channels."""
    tokens: int
    """All positions, padding included."""


def partition_tokens(labels: Tensor, attention_mask: Tensor | None = None, *, shifted: bool = False) -> TokenPartition:
    """Split a batch by its labels.

    A position is dense if ``labels[t] != -100`` or ``labels[t+1] != -100``: the last prompt token's logits enter the
    loss. Every other real token is context. The split is per token, so prompts of different lengths lose nothing.

    Args:
        labels: (B, S) int64, -100 where no loss is taken. With ``shifted``, entry t is the label of position t+1
            (``shift_labels`` of sequence parallelism).
        attention_mask: (B, S), zero at padding; anything else (``None``, a 4-D mask) means that no position is
            padding.

    Returns:
        The partition, on the device of ``labels``. Making it waits for the device once per batch.
    """
    trained = labels != IGNORE_INDEX
    dense = trained.clone()
    if shifted:
        dense[:, 1:] |= trained[:, :-1]
    else:
        dense[:, :-1] |= trained[:, 1:]
    context = ~dense
    if attention_mask is not None and attention_mask.shape == labels.shape:
        context &= attention_mask.to(labels.device) != 0
    return TokenPartition(
        dense=dense.flatten().nonzero().squeeze(1),
        context=context.flatten().nonzero().squeeze(1),
        tokens=labels.numel(),
    )


def loss_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions whose next token carries a label, and these labels.

    Args:
        labels: (B, S) int64.

    Returns:
        ``rows`` (n,) int64 ascending and ``targets`` (n,) int64: the causal loss is the cross entropy between them.
    """
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    rows = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return rows, following.index_select(0, rows)
