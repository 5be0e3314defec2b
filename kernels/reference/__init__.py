"""The plain formula of every operation: dense compute with masks, differentiable by autograd, written to be read."""

from .indexed_linear import indexed_linear, indexed_projection
from .nf4 import nf4_rows
from .rows import join_rows, split_rows
from .score import gated_ffn_score, projection_score
from .select import select_channels
from .split_linear import split_linear

__all__ = [
    "gated_ffn_score",
    "indexed_linear",
    "indexed_projection",
    "join_rows",
    "nf4_rows",
    "projection_score",
    "select_channels",
    "split_linear",
    "split_rows",
]
