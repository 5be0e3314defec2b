"""LM head and loss only where a label is: exact, and a large share of a step at real vocabularies.

In a training forward with labels, positions whose next token carries no label do not enter the loss. Their rows are taken
out before the LM head, and the loss function is given the labels of the rows that are left. The model's ``logits`` are
then (1, labels, vocabulary) instead of (B, S, vocabulary). Evaluation, generation and forwards without labels are whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .context import SparseContext


class LogitsHook:
    """Forward pre-hook of the LM head: keeps the rows whose logits the loss reads."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = self.context.loss_positions
        if wanted is None or args[0].shape[:-1] != wanted.shape:
            return None  # Dense forward, or the caller asked for some positions by logits_to_keep.
        wanted.packed = True
        return (args[0].flatten(0, -2).index_select(0, wanted.rows).unsqueeze(0), *args[1:])


class PackedLoss:
    """Takes the place of one model's ``loss_function``; hands packed logits the labels that belong to them."""

    def __init__(self, model: Any, context: SparseContext) -> None:
        self.context = context
        self.own = model.__dict__.get("_loss_function")
        self.original = model.loss_function

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = self.context.loss_positions
        if wanted is not None and wanted.packed:
            kwargs["shift_labels"] = wanted.labels.unsqueeze(0)
        return self.original(logits, labels, *args, **kwargs)


def pack_logits(model: Any, context: SparseContext) -> list[Any]:
    """Switch it on for a Hugging Face causal LM; returns handles whose ``remove()`` switches it off."""
    hook = model.get_output_embeddings().register_forward_pre_hook(LogitsHook(context))
    loss = PackedLoss(model, context)
    model.loss_function = loss
    return [hook, _RestoreLoss(model, loss)]


class _RestoreLoss:
    def __init__(self, model: Any, loss: PackedLoss) -> None:
        self.model, self.loss = model, loss

    def remove(self) -> None:
        if self.loss.own is None:
            del self.model._loss_function
        else:
            self.model.loss_function = self.loss.own
