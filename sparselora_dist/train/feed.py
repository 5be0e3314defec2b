"""A micro-batch's rows as the model is called with them: packed into one line, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import TokenDataset, collate, collate_packed
from ..layers.packed_attention import PackedRows
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """Makes the inputs of one run's micro-batches.

    Neither form has an attention mask: packed rows are kept apart by their lengths, and causal attention never looks at
    padding on the right.

    Args:
        packed: one line of rows without padding.
        implementation: the model's attention, which decides how it is told where rows end.
    """

    dataset: TokenDataset
    pad_token_id: int
    device: torch.device
    packed: bool
    implementation: str

    def __call__(self, rows: Sequence[int]) -> MicroBatchInputs:
        """The inputs for some rows of the dataset."""
        if self.packed:
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
