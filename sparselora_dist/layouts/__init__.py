"""What a decoder layer has: an FFN, an attention, neither; where their matrices are, seen in its modules."""

from .ffn import FFN
from .layers import DecoderLayer, check_causal, check_known, check_run, decoder_layers, geometry
from .names import Parts, Rows, UnsupportedModelError, base_linear, causal_lm, matrix_name
from .tried import computes_linear

__all__ = [
    "FFN",
    "DecoderLayer",
    "Parts",
    "Rows",
    "UnsupportedModelError",
    "base_linear",
    "causal_lm",
    "check_causal",
    "check_known",
    "check_run",
    "computes_linear",
    "decoder_layers",
    "geometry",
    "matrix_name",
]
