"""What a decoder layer has: an FFN, an attention, neither; where their matrices are, seen in its modules."""

from .experts import Experts, combined, innermost
from .layers import DecoderLayer, check_causal, check_known, check_run, decoder_layers, geometry
from .names import UnsupportedModelError, base_linear, causal_lm, matrix_name

__all__ = [
    "DecoderLayer",
    "Experts",
    "UnsupportedModelError",
    "base_linear",
    "causal_lm",
    "check_causal",
    "check_known",
    "check_run",
    "combined",
    "decoder_layers",
    "geometry",
    "innermost",
    "matrix_name",
]
