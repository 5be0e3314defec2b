"""Held-out loss and accuracy, dense, over all ranks; logits are made at label positions only, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from sparselora_kernels import scores_of

from ..engines import Engine
from ..layers.context import SparseContext
from .feed import Feed

FIGURES = ("eval_loss", "eval_mean_token_accuracy", "eval_exact_match")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the held-out set."""

    loss: float
    """Cross entropy per label token, nats."""
    token_accuracy: float
    """Share of label tokens whose greedy prediction is right, given the true tokens before."""
    exact_match: float
    """Share of rows with every label token right: exactly the rows that greedy decoding completes as written."""

    def row(self) -> dict[str, float]:
        """As ``metrics.jsonl`` and the summary call them."""
        return dict(zip(FIGURES, (self.loss, self.token_accuracy, self.exact_match)))


@torch.no_grad()
def evaluate(
    engine: Engine,
    context: SparseContext,
    feed: Feed,
    batch_size: int,
    progress: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Over all rows of ``feed``'s dataset, ``batch_size`` rows a rank where they are padded.

    Every rank must call this; one without rows left runs all the same, so that no collective is missed. ``progress`` shows
    a bar, on a terminal. ``stops``, a collective, is asked after each batch; ``None`` if it said so.
    """
    engine.model.eval()
    context.evaluating = True
    loss = right = labels_seen = rows_right = rows = 0.0
    batches = feed.eval_batches(batch_size)
    try:
        for indices in tqdm(batches, "evaluating", disable=None if progress else True, leave=False, unit="batch"):
            inputs = feed.inputs(indices)
            context.hand_over(inputs.labels, inputs.partition)
            with engine.autocast():
                scores = engine.model(
                    **inputs.arguments, labels=inputs.labels, use_cache=False, num_items_in_batch=1
                ).logits
            if scores.dim() == 3:  # Rows' logits, of a family that makes something of them that is not known.
                scores = scores_of(scores.squeeze(0), inputs.partition.loss_labels)
            else:
                scores = scores / context.head_unit
            losses, fits = scores.double().cpu().unbind(1)
            loss += losses.sum().item()
            right += fits.sum().item()
            labels_seen += losses.numel()
            # Of the batch's rows: those with a label, and those of them with a wrong prediction.
            row = inputs.rows.flatten().index_select(0, inputs.partition.loss_rows.cpu())
            rows += (seen := row.unique().numel())
            rows_right += seen - row[fits == 0].unique().numel()
            if stops():
                return None
    finally:
        context.evaluating = False
        engine.model.train()
    loss, right, labels_seen, rows_right, rows = engine.all_sum(loss, right, labels_seen, rows_right, rows)
    labels_seen, rows = max(labels_seen, 1.0), max(rows, 1.0)
    return Evaluation(loss / labels_seen, right / labels_seen, rows_right / rows)
