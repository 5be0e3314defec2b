"""Token partition: dense, context and padding positions of a batch, and the positions whose logits the loss reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPartition:
    """Flat positions (``batch * sequence + t``) of one micro-batch, each list ascending int64."""

    dense: Tensor
    """Positions that are computed whole: their own or the next position's label is trained on."""
    context: Tensor
    """The other real tokens: computed sparsely, and the ones that choose the channels."""
    tokens: int
    """All positions, padding included."""
    loss_rows: Tensor
    """(n,) Positions whose next token carries a label; all of them are dense."""
    loss_labels: Tensor
    """(n,) int64, these labels: the causal loss is the cross entropy between the two."""

    def to(self, device: torch.device) -> TokenPartition:
        """The same on ``device``; does not wait for it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenPartition(**{k: send(v, device) if isinstance(v, Tensor) else v for k, v in values.items()})


def partition_tokens(labels: Tensor, attention_mask: object = None, *, shifted: bool = False) -> TokenPartition:
    """Split a batch by its labels.

    A position is dense if ``labels[t] != -100`` or ``labels[t+1] != -100``: the last prompt token's logits enter the
    loss. Every other real token is context. The split is per token, so prompts of different lengths lose nothing.

    Args:
        labels: (B, S) int64, -100 where no loss is taken. With ``shifted``, entry t is the label of position t+1
            (``shift_labels`` of sequence parallelism).
        attention_mask: (B, S), zero at padding; anything else (``None``, a 4-D mask, a dict of masks by kind of
            layer) means that no position is padding.

    Returns:
        The partition, on the device of ``labels``. Labels on a GPU cost one wait for it, labels on the host none.
    """
    trained = labels != IGNORE_INDEX
    pad = torch.nn.functional.pad
    if shifted:
        following, read, own = labels, trained, pad(trained, (1, 0))[:, :-1]
    else:
        following = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        read, own = pad(trained, (0, 1))[:, 1:], trained
    dense = own | read
    real = torch.ones_like(dense)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
        # From a GPU to the host it must be waited for.
        real = attention_mask.to(labels.device, non_blocking=labels.device.type != "cpu") != 0
    # Sorted by kind, each kind in its order; cutting the list needs the three counts, which are fetched together.
    kind = torch.where(dense, 0, torch.where(real, 1, 2)).to(torch.uint8).flatten()
    order = kind.argsort(stable=True)
    loss_order = (~read).to(torch.uint8).flatten().argsort(stable=True)
    counts = torch.stack([(kind == 0).sum(), (kind == 1).sum(), read.sum()])
    n_dense, n_context, n_loss = counts.tolist()
    loss_rows = loss_order[:n_loss]
    return TokenPartition(
        dense=order[:n_dense],
        context=order[n_dense : n_dense + n_context],
        tokens=labels.numel(),
        loss_rows=loss_rows,
        loss_labels=following.flatten().index_select(0, loss_rows),
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; from the host to a GPU through pinned memory, without waiting for either."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
