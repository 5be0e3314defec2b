"""One matrix of a model, quantised as it will be stored."""

from __future__ import annotations

import torch
from torch import Tensor

from sparselora_kernels.stored import unpack

from ..codecs import Codec, LevelsCodec
from ..layerwise.second_moments import upper_of_inverse
from .compensation import Compensate, output_error, quantize
from .encoders import encoder_of


@torch.no_grad()
def quantized(
    weight: Tensor, codec: Codec, transposed: bool, products: Tensor | None, tokens: int, how: Compensate
) -> tuple[dict[str, Tensor], float]:
    """The parts of a matrix, as ``codec`` names them, and its error by :func:`output_error`.

    Args:
        weight: (out, in), in the model's dtype.
        codec: what it is stored as.
        transposed: whether a stored row is an input.
        products: XᵀX (in, in) fp32 of the calibration tokens; ``None`` without any.
        tokens: how many these are.
        how: errors are made up for.

    Raises:
        ValueError: a value cannot be stored, or the second moments have no Cholesky factor.
    """
    rows = weight.t().contiguous() if transposed else weight
    if how == "none" and not needs_data(codec):
        parts = codec.encode(rows, 0)
    else:
        assert products is not None, "calibration is asked for without tokens"
        upper = upper_of_inverse(products * (2.0 / tokens))
        encoder = encoder_of(codec, rows)
        quantize(encoder, rows.float(), upper, how, transposed)
        parts = encoder.parts()
    found = decoded(codec, parts, rows.shape[1], torch.float32)
    return parts, output_error(weight.float(), found.t() if transposed else found, products)


def needs_data(codec: Codec) -> bool:
    """Whether a format cannot be made from the weights alone."""
    return isinstance(codec, LevelsCodec) and codec.format == "billm"


def decoded(codec: Codec, parts: dict[str, Tensor], length: int, dtype: torch.dtype) -> Tensor:
    """The stored rows (channels, length) that all parts of a matrix hold."""
    names = codec.parts(length)
    return unpack(codec.stored(tuple(parts[name] for name in names), length)).decode(None, dtype)
