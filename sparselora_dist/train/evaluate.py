"""Held-out loss and accuracy, dense, over all ranks; logits are made at label positions only, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data import TokenDataset, collate, eval_batches
from ..engines import Engine
from ..layers.context import SparseContext
from ..method.tokens import partition_tokens, send


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
def evaluate(
    engine: Engine, context: SparseContext, dataset: TokenDataset, batch_size: int, pad_token_id: int
) -> Evaluation:
    """Every rank must call this; ranks without rows left run empty batches, so that no collective is missed."""
    engine.model.eval()
    context.evaluating = True
    loss = right = labels_seen = rows_right = rows = 0.0
    try:
        for indices in eval_batches(dataset, batch_size, engine.ranks.world_size, engine.ranks.rank):
            host = collate(dataset, indices, pad_token_id)
            partition = partition_tokens(host["labels"], host["attention_mask"])
            batch = {name: send(tensor, engine.device) for name, tensor in host.items()}
            context.hand_over(batch["labels"], partition.to(engine.device))
            with engine.autocast():
                scores = engine.model(**batch, use_cache=False, num_items_in_batch=1).logits.double().cpu()
            loss += scores[:, 0].sum().item()
            right += scores[:, 1].sum().item()
            # Of the batch's rows: those with a label, and those of them with a wrong prediction.
            row = partition.loss_rows // host["labels"].shape[1]
            labels_seen += row.numel()
            rows += (seen := row.unique().numel())
            rows_right += seen - row[scores[:, 1] == 0].unique().numel()
    finally:
        context.evaluating = False
        engine.model.train()
    loss, right, labels_seen, rows_right, rows = engine.all_sum(loss, right, labels_seen, rows_right, rows)
    labels_seen, rows = max(labels_seen, 1.0), max(rows, 1.0)
    return Evaluation(loss / labels_seen, right / labels_seen, rows_right / rows)
