"""The plain formula of every operation: dense compute with masks, differentiable by autograd, written to be read."""

from .expert_score import expert_score
from .ffn_down import ffn_down
from .ffn_up import ffn_up
from .floats import float_rows
from .gated_ffn import gated_up
from .gated_product import gated_product
from .grouped import grouped_linear, grouped_product
from .indexed_linear import indexed_nn, indexed_nt
from .label_loss import label_loss, label_scores
from .level_rows import level_rows
from .lora_joined import lora_joined
from .lora_linear import lora_linear
from .masked_linear import masked_down, masked_linear, masked_up
from .masked_weight import masked_weight
from .nf4 import nf4_rows
from .nonzero import nonzero
from .score import ffn_score, gated_ffn_score, projection_score
from .select import select_channels

__all__ = [
    "expert_score",
    "ffn_down",
    "ffn_score",
    "ffn_up",
    "float_rows",
    "gated_ffn_score",
    "gated_product",
    "gated_up",
    "grouped_linear",
    "grouped_product",
    "indexed_nn",
    "indexed_nt",
    "label_loss",
    "label_scores",
    "level_rows",
    "lora_joined",
    "lora_linear",
    "masked_down",
    "masked_linear",
    "masked_up",
    "masked_weight",
    "nf4_rows",
    "nonzero",
    "projection_score",
    "select_channels",
]
