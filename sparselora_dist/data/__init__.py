"""Instruction data: rows of any accepted layout -> tokens and labels -> batches independent of the world size."""

from sparselora_dist.data.dataset import TokenDataset, load_dataset_tokens
from sparselora_dist.data.formats import LAYOUTS, EncodedRow, Layout, RowFormatter, alpaca_prompt, encode_row
from sparselora_dist.data.loader import (
    IGNORE,
    NO_ROW,
    GlobalBatch,
    GlobalBatchSampler,
    collate,
    eval_batches,
    padding_id,
)

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "NO_ROW",
    "EncodedRow",
    "GlobalBatch",
    "GlobalBatchSampler",
    "Layout",
    "RowFormatter",
    "TokenDataset",
    "alpaca_prompt",
    "collate",
    "encode_row",
    "eval_batches",
    "load_dataset_tokens",
    "padding_id",
]
