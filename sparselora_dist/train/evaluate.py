"""Held-out loss and accuracy, dense, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..engines import Engine
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
def evaluate(engine: Engine, feed: Feed, batch_size: int, progress: bool = False) -> Evaluation:
    """Over all rows of ``feed``'s dataset, ``batch_size`` rows a rank where they are padded.

    Every rank must call this; one without rows left runs all the same, so that no collective is missed. ``progress`` shows
    a bar, on a terminal.
    """
    engine.model.eval()
    loss = right = labels_seen = rows_right = rows = 0.0
    batches = feed.eval_batches(batch_size)
    for indices in tqdm(batches, "evaluating", disable=None if progress else True, leave=False, unit="batch"):
        inputs = feed.inputs(indices)
        with engine.autocast():
            logits = engine.model(**inputs.arguments, use_cache=False).logits
        read, labels = inputs.partition.loss_rows, inputs.partition.loss_labels
        logits = logits.flatten(0, 1).index_select(0, read).float()
        correct = (logits.argmax(-1) == labels).cpu()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += correct.sum().item()
        labels_seen += labels.numel()
        # Of every row: how many labels it has, and how many of them are right.
        row = inputs.rows.flatten().index_select(0, read.cpu())
        has, fits = (row.bincount(weights) for weights in (None, correct.double()))
        rows += (has > 0).sum().item()
        rows_right += ((has > 0) & (fits == has)).sum().item()
    engine.model.train()
    loss, right, labels_seen, rows_right, rows = engine.all_sum(loss, right, labels_seen, rows_right, rows)
    labels_seen, rows = max(labels_seen, 1.0), max(rows, 1.0)
    return Evaluation(loss / labels_seen, right / labels_seen, rows_right / rows)
