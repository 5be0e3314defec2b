"""The model's loss on the sample with chosen sites sparse: forward only, on any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import TokenDataset, collate
from ..engines import Engine
from ..layers.context import SparseContext
from .budget import Site
from .sample import Sample


class Prober:
    """Runs the sample through a prepared model. Every rank has one and calls it in the same order.

    Args:
        engine: holds the model, sparse in every layer that is to be probed, with ``mask_sync`` "global".
        context: of the model's sparse layers.
        dataset, sample: what is run; the size of the sample's batches is a multiple of the number of ranks.
        pad_token_id: pads rows.
    """

    def __init__(
        self, engine: Engine, context: SparseContext, dataset: TokenDataset, sample: Sample, pad_token_id: int
    ) -> None:
        self.engine, self.context = engine, context
        self.dataset, self.sample, self.pad_token_id = dataset, sample, pad_token_id

    @torch.no_grad()
    def loss(self, keep: Mapping[Site, int]) -> float:
        """Mean cross entropy per label token (nats) with ``keep`` channels at each named site, and all elsewhere."""
        total = 0.0
        for number in range(len(self.sample.batches)):
            total += self.forward(self.inputs(number), keep).loss.item()
        self.context.sync.check()
        (loss,) = self.engine.all_sum(total)
        return loss / self.sample.labels

    def inputs(self, number: int) -> dict[str, Tensor]:
        """This rank's rows of batch ``number``, dealt by stride: row ``i`` of the batch is rank ``i % world``'s."""
        ranks = self.engine.ranks
        rows = self.sample.batches[number][ranks.rank :: ranks.world_size]
        batch = collate(self.dataset, rows, self.pad_token_id)
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor], keep: Mapping[Site, int]) -> Any:
        """The model's output; its ``loss`` is the sum over the label tokens, zero where there are none."""
        self.engine.model.eval()
        self.context.probe = dict(keep)
        try:
            with self.engine.autocast():
                return self.engine.model(**inputs, use_cache=False, num_items_in_batch=1.0)
        finally:
            self.context.probe = None
