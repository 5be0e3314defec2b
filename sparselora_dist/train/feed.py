"""Rows as the model is called with them: packed into one line to a token budget, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.run import RunConfig
from ..data import (
    GlobalBatch,
    PackedBatch,
    TokenDataset,
    collate,
    collate_packed,
    eval_batches,
    pack,
    packed_eval_batches,
)
from ..engines import Engine
from ..layers.packed_attention import PackedRows
from ..layouts import causal_lm
from ..method.tokens import TokenPartition, partition_tokens, send


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchInputs:
    """What a forward takes."""

    arguments: dict[str, Any]
    """Of the model, on the device; without ``labels``."""
    labels: Tensor
    """(B, S) int64 on the device, -100 where there is no loss."""
    partition: TokenPartition
    """On the device; made on the host, so that nothing waits to learn how many tokens are of which kind."""
    rows: Tensor
    """(B, S) int64 on the host: which row of the micro-batch a position belongs to."""


class Feed:
    """Makes the micro-batches of one dataset in a run, and their inputs.

    Neither form has an attention mask: packed rows are kept apart by their lengths, and causal attention never looks at
    padding on the right.

    Args:
        config: says whether rows are packed, and to which budget.
        engine: holds the model.
        dataset: where the rows are from.
        pad_token_id: fills padded rows, and stands in for a row where a rank has none.
        quadratic: see :func:`sparselora_dist.data.pack`.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, dataset: TokenDataset, pad_token_id: int, quadratic: float
    ) -> None:
        self.config, self.ranks, self.device = config, engine.ranks, engine.device
        self.dataset, self.pad_token_id, self.quadratic = dataset, pad_token_id, quadratic
        model: Any = causal_lm(engine.module)
        self.implementation: str = model.config._attn_implementation

    def laid_out(self, batch: GlobalBatch) -> GlobalBatch | PackedBatch:
        """The micro-batches of an optimizer step: packed where the run is, the same rows."""
        if not self.config.packing:
            return batch
        budget, world = self.config.token_budget, self.ranks.world_size
        return pack(batch.indices, self.dataset.lengths, budget, world, self.quadratic)

    def eval_batches(self, batch_size: int) -> list[list[int]]:
        """This rank's batches over the whole dataset, as many on every rank: of ``batch_size`` rows, or packed."""
        world, rank = self.ranks.world_size, self.ranks.rank
        if not self.config.packing:
            return eval_batches(self.dataset, batch_size, world, rank)
        budget = max(self.config.token_budget, batch_size * self.config.data.max_length)
        return packed_eval_batches(self.dataset.lengths, budget, world, rank, self.quadratic)

    def inputs(self, rows: Sequence[int]) -> MicroBatchInputs:
        """What the model is called with for some rows."""
        if self.config.packing:
            host = collate_packed(self.dataset, rows, self.pad_token_id)
            lengths = host["lengths"]
            arguments = {"input_ids": host["input_ids"], "position_ids": host["position_ids"]}
            extra = PackedRows.of(lengths, self.device).arguments(self.implementation)
            number = torch.arange(lengths.numel()).repeat_interleave(lengths)[None]
        else:
            host = collate(self.dataset, rows, self.pad_token_id)
            host["real"] = host.pop("attention_mask")
            arguments, extra = {"input_ids": host["input_ids"]}, {}
            number = torch.arange(len(rows))[:, None].expand_as(host["labels"])
        return MicroBatchInputs(
            arguments={name: send(tensor, self.device) for name, tensor in arguments.items()} | extra,
            labels=send(host["labels"], self.device),
            partition=partition_tokens(host["labels"], host["real"]).to(self.device),
            rows=number,
        )
