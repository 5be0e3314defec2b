"""What a decoder layer has: an FFN, an attention, neither; where their matrices are, seen in its modules."""

from .layers import DecoderLayer, check_causal, check_config, check_known, decoder_layers, geometry
from .names import UnsupportedModelError, base_linear, causal_lm, matrix_name
from .sizes import layer_sizes

__all__ = [
    "DecoderLayer",
    "UnsupportedModelError",
    "base_linear",
    "causal_lm",
    "check_causal",
    "check_config",
    "check_known",
    "decoder_layers",
    "geometry",
    "layer_sizes",
    "matrix_name",
]
