"""The plain formula of every operation: dense compute with masks, differentiable by autograd, written to be read."""

from .indexed_linear import indexed_linear, indexed_projection
from .rows import join_rows, split_rows
from .score import gated_ffn_score, projection_score
from .select import select_channels

__all__ = [
    "gated_ffn_score",
    "indexed_linear",
    "indexed_projection",
    "join_rows",
    "projection_score",
    "select_channels",
    "split_rows",
]
