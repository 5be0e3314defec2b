"""Instruction data: rows of any accepted layout -> tokens and labels -> batches independent of the world size."""

from .dataset import TokenDataset, load_dataset_tokens
from .formats import LAYOUTS, EncodedRow, Layout, RowFormatter, alpaca_prompt, encode_row
from .loader import (
    IGNORE,
    NO_ROW,
    GlobalBatch,
    GlobalBatchSampler,
    collate,
    eval_batches,
    padding_id,
)
from .packing import PackedBatch, collate_packed, pack, packed_eval_batches

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "NO_ROW",
    "EncodedRow",
    "GlobalBatch",
    "GlobalBatchSampler",
    "Layout",
    "PackedBatch",
    "RowFormatter",
    "TokenDataset",
    "alpaca_prompt",
    "collate",
    "collate_packed",
    "encode_row",
    "eval_batches",
    "load_dataset_tokens",
    "pack",
    "packed_eval_batches",
    "padding_id",
]
