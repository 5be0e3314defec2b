"""The sparse operations of the project: tensors in, tensors out.

This package knows nothing of models, configurations or distribution. Each operation lives in the file of its name;
the plain formula that it is tested against lives under the same name in ``reference/``.

The folder is called ``kernels/`` and imported as ``sparselora_kernels``: the name ``kernels`` belongs to a Hugging
Face package.
"""

from .activations import activation_name
from .indexed_linear import indexed_linear, indexed_projection
from .nf4 import nf4_rows
from .rows import join_rows, split_rows
from .score import gated_ffn_score, projection_score, projection_scores
from .select import kept_count, select_channels
from .split_linear import split_linear
from .stored import EncodedWeight, Weight

__all__ = [
    "EncodedWeight",
    "Weight",
    "activation_name",
    "gated_ffn_score",
    "indexed_linear",
    "indexed_projection",
    "join_rows",
    "kept_count",
    "nf4_rows",
    "projection_score",
    "projection_scores",
    "select_channels",
    "split_linear",
    "split_rows",
]
