"""LM head and loss only where a label is: exact, and a large share of a step at real vocabularies.

In a training forward with labels, positions whose next token carries no label do not enter the loss. Their rows are taken
out before the LM head, and the loss function is given the labels of the rows that are left. The model's ``logits`` are
then (1, labels, vocabulary) instead of (B, S, vocabulary). Evaluation, generation and forwards without labels are whole.

Who reads no logits says so, and they are made in chunks and never whole (:mod:`sparselora_kernels.label_loss`):

- ``context.chunk_loss`` (our training loop): the model's ``logits`` are () fp32, the sum of the label's cross entropies,
  and its loss is Transformers' loss;
- ``context.evaluating`` (our evaluation, with labels): they are (n, 2) fp32, the cross entropy of each label, in the
  order of its position, and 1 where the greedy prediction is right.

Where a family scales or caps its logits (:mod:`.head_trial`), so do the chunks, and what is given in the place of logits is
in units of ``context.head_unit``. Where it does something else with them, both are the rows' logits, and its own loss.

All of it happens inside the LM head's own forward, because that is where an engine has gathered its weight, once,
however many labels a rank has. A head that is trained or carries an adapter gives the rows' logits, whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from sparselora_kernels import label_loss, label_scores, scores_of

from ..codecs.linear import compute_input
from ..sharding.units import read_in_backward
from .context import SparseContext
from .head_trial import Shaping, logits_shaping


class LogitsHook:
    """Forward pre-hook of the LM head: keeps the rows whose logits the loss reads."""

    def __init__(self, context: SparseContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = self.context.loss_positions
        if wanted is None or args[0].shape[:-1] != wanted.shape:
            return None  # Dense forward, or the caller asked for some positions by logits_to_keep.
        wanted.head = "rows"
        return (args[0].flatten(0, -2).index_select(0, wanted.rows).unsqueeze(0), *args[1:])


class PackedLoss:
    """Takes the place of one model's ``loss_function``; hands packed logits the labels that belong to them."""

    def __init__(self, model: Any, context: SparseContext) -> None:
        self.context = context
        self.own = model.__dict__.get("_loss_function")
        self.original = model.loss_function

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = self.context.loss_positions
        if wanted is None or wanted.head == "whole":
            return self.original(logits, labels, *args, **kwargs)
        if wanted.head == "rows":
            return self.original(logits, labels, *args, **kwargs | {"shift_labels": wanted.labels.unsqueeze(0)})
        total = logits if wanted.head == "sum" else logits[:, 0].sum()
        if self.context.head_unit != 1.0:
            total = total / self.context.head_unit
        items = kwargs.get("num_items_in_batch")
        if isinstance(items, Tensor):
            items = items.to(total.device)
        return total / (wanted.labels.numel() if items is None else items)


class ChunkedHead:
    """Takes the place of ``forward`` of the LM head: what is read of the logits instead of logits, where one may.

    Args:
        plain: the head is a linear without anything around it, and the loss the usual one.
        shaping: what the model makes of the head's output; ``None`` where that is not known: the family then computes its
            own loss from the rows' logits.
    """

    def __init__(self, head: nn.Module, context: SparseContext, plain: bool, shaping: Shaping | None) -> None:
        self.head, self.context, self.plain, self.shaping = head, context, plain, shaping
        self.own = head.__dict__.get("forward")
        self.original: Callable[..., Tensor] = head.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted, head, shaping = self.context.loss_positions, self.head, self.shaping
        asked = wanted.asked if wanted is not None and wanted.head == "rows" and shaping is not None else "rows"
        chunked = self.plain and asked != "rows" and not any(p.requires_grad for p in head.parameters(recurse=False))
        read_in_backward(head, not (chunked and asked == "sum"))
        if wanted is None or shaping is None or asked == "rows" or (asked == "sum" and not chunked):
            return self.original(x, *args, **kwargs)
        wanted.head = asked
        if not chunked:
            logits = self.original(x, *args, **kwargs).squeeze(0)
            return shaping.reduced(scores_of(logits if shaping.plain else shaping(logits.float()), wanted.labels))
        x, weight = compute_input(x.squeeze(0)), compute_input(head.weight)
        bias = None if head.bias is None else compute_input(head.bias)
        function = label_loss if asked == "sum" else label_scores
        return shaping.reduced(function(x, weight, bias, wanted.labels, shaping.scale, shaping.cap))


def pack_logits(model: Any, context: SparseContext) -> list[Any]:
    """Switch it on for a Hugging Face causal LM; returns handles whose ``remove()`` switches it off.

    Not where the model's forward computes its loss by itself instead of asking ``loss_function``.
    """
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        context.skip_unused_logits = False
        return []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(LogitsHook(context))
    loss = PackedLoss(model, context)
    model.loss_function = loss
    bare = type(head) is nn.Linear and not head._forward_hooks and "forward" not in head.__dict__
    shaping = logits_shaping(model)
    context.head_unit = shaping.unit if shaping else 1.0
    chunked = ChunkedHead(head, context, bare and loss.original is ForCausalLMLoss, shaping)
    head.__dict__["forward"] = chunked
    return [hook, _Restore(model, "_loss_function", loss.own), _Restore(head, "forward", chunked.own)]


class _Restore:
    """Puts an attribute of a module back, or takes it away where there was none."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value

    def remove(self) -> None:
        if self.value is None:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.value
