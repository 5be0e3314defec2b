"""The sparse operations of the project: tensors in, tensors out.

This package knows nothing of models, configurations or distribution. Each operation lives in the file of its name;
the plain formula that it is tested against lives under the same name in ``reference/``.

The folder is called ``kernels/`` and imported as ``sparselora_kernels``: the name ``kernels`` belongs to a Hugging
Face package.
"""

from .activations import activation_name
from .expert_score import expert_score
from .ffn_down import ffn_down
from .ffn_up import ffn_up
from .floats import float_rows
from .formats import float_layout, level_layout, nf4_layout
from .gated_ffn import gated_up
from .gated_product import gated_product
from .grouped import grouped_linear, grouped_product
from .label_loss import chunk_rows, label_loss, label_scores, row_bytes, scores_of
from .level_rows import level_rows
from .lora_joined import lora_joined
from .lora_linear import lora_linear, lora_order
from .masked_linear import masked_down, masked_linear, masked_up
from .nf4 import nf4_rows
from .nonzero import nonzero
from .routing import Pairs, collect, expert_pairs, spread
from .score import ffn_score, gated_ffn_score, projection_score, projection_scores
from .select import kept_count, kept_per_expert, select_channels, select_checked, select_grouped
from .stored import EncodedWeight, Weight, rows_of

__all__ = [
    "EncodedWeight",
    "Pairs",
    "Weight",
    "activation_name",
    "chunk_rows",
    "collect",
    "expert_pairs",
    "expert_score",
    "ffn_down",
    "ffn_score",
    "ffn_up",
    "float_layout",
    "float_rows",
    "gated_ffn_score",
    "gated_product",
    "gated_up",
    "grouped_linear",
    "grouped_product",
    "kept_count",
    "kept_per_expert",
    "label_loss",
    "label_scores",
    "level_layout",
    "level_rows",
    "lora_joined",
    "lora_linear",
    "lora_order",
    "masked_down",
    "masked_linear",
    "masked_up",
    "nf4_layout",
    "nf4_rows",
    "nonzero",
    "projection_score",
    "projection_scores",
    "row_bytes",
    "rows_of",
    "scores_of",
    "select_channels",
    "select_checked",
    "select_grouped",
    "spread",
]
