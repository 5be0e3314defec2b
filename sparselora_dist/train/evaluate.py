"""Held-out loss and accuracy, dense, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..data import TokenDataset, collate, eval_batches
from ..engines import Engine
from ..method.tokens import IGNORE_INDEX

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
    engine: Engine, dataset: TokenDataset, batch_size: int, pad_token_id: int, progress: bool = False
) -> Evaluation:
    """Every rank must call this; ranks without rows left run empty batches, so that no collective is missed.

    ``progress`` shows a bar, on a terminal.
    """
    engine.model.eval()
    loss = right = labels_seen = rows_right = rows = 0.0
    batches = eval_batches(dataset, batch_size, engine.ranks.world_size, engine.ranks.rank)
    for indices in tqdm(batches, "evaluating", disable=None if progress else True, leave=False, unit="batch"):
        batch = {name: t.to(engine.device) for name, t in collate(dataset, indices, pad_token_id).items()}
        labels = batch.pop("labels")[:, 1:]
        with engine.autocast():
            logits = engine.model(**batch, use_cache=False).logits[:, :-1].float()
        trained = labels != IGNORE_INDEX
        correct = (logits.argmax(-1) == labels) | ~trained
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        right += (correct & trained).sum().item()
        labels_seen += trained.sum().item()
        has_label = trained.any(1)
        rows += has_label.sum().item()
        rows_right += (correct.all(1) & has_label).sum().item()
    engine.model.train()
    loss, right, labels_seen, rows_right, rows = engine.all_sum(loss, right, labels_seen, rows_right, rows)
    labels_seen, rows = max(labels_seen, 1.0), max(rows, 1.0)
    return Evaluation(loss / labels_seen, right / labels_seen, rows_right / rows)
