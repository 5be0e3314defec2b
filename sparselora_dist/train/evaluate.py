"""Held-out loss and accuracy, dense, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..engines import Engine
from .feed import Feed


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the held-out set."""

    loss: float
    """Cross entropy per label token, nats."""
    token_accuracy: float
    """Share of label tokens whose greedy prediction is right, given the true tokens before."""
    exact_match: float
    """Share of rows with every label token right: exactly the rows that greedy decoding completes as written."""


@torch.no_grad()
def evaluate(engine: Engine, feed: Feed, batches: Sequence[Sequence[int]]) -> Evaluation:
    """Over the rows of ``batches``, this rank's part of the held-out set.

    Every rank must call this with as many batches; one without rows runs all the same, so that no collective is missed.
    """
    engine.model.eval()
    loss = right = labels_seen = rows_right = rows = 0.0
    for indices in batches:
        inputs = feed(indices)
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
