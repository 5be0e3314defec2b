"""What a decoder layer has: an FFN, an attention, neither; where their matrices are, seen in its modules."""

from .attention import Attention
from .described import adapted, described, rest_of
from .experts import BY_ROWS, Experts, combined, innermost, placeholder
from .ffn import FFN
from .layers import DecoderLayer, check_causal, check_config, check_known, check_text, decoder_layers, geometry
from .names import Parts, Rows, UnsupportedModelError, base_linear, causal_lm, matrix_name
from .registry import register_attention, register_ffn, unregister
from .sizes import layer_sizes, widths
from .tried import computes_linear

__all__ = [
    "BY_ROWS",
    "FFN",
    "Attention",
    "DecoderLayer",
    "Experts",
    "Parts",
    "Rows",
    "UnsupportedModelError",
    "adapted",
    "base_linear",
    "causal_lm",
    "check_causal",
    "check_config",
    "check_known",
    "check_text",
    "combined",
    "computes_linear",
    "decoder_layers",
    "described",
    "geometry",
    "innermost",
    "layer_sizes",
    "matrix_name",
    "placeholder",
    "register_attention",
    "register_ffn",
    "rest_of",
    "unregister",
    "widths",
]
