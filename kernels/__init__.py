"""The sparse operations of the project: tensors in, tensors out.

This package knows nothing of models, configurations or distribution. Each operation lives in the file of its name;
the plain formula that it is tested against lives under the same name in ``reference/``.

The folder is called ``kernels/`` and imported as ``sparselora_kernels``: the name ``kernels`` belongs to a Hugging
Face package.
"""

from .indexed_linear import indexed_linear, indexed_projection
from .rows import join_rows, split_rows
from .score import gated_ffn_score, projection_score
from .select import kept_count, select_channels

__all__ = [
    "gated_ffn_score",
    "indexed_linear",
    "indexed_projection",
    "join_rows",
    "kept_count",
    "projection_score",
    "select_channels",
    "split_rows",
]
