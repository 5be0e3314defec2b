"""One matrix of a model, quantised as it will be stored, and where an adapter on it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparselora_kernels.stored import unpack

from ..codecs import Codec, LevelsCodec
from ..layerwise.second_moments import upper_of_inverse
from ..method.loftq import Pair, alternate
from .compensation import Compensate, output_error, quantize
from .encoders import encoder_of


class Adapted(Protocol):
    """The adapter that a matrix is under."""

    @property
    def rank(self) -> int: ...

    @property
    def scaling(self) -> float: ...

    @property
    def seed(self) -> int:
        """Of a randomised SVD."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a matrix has become."""

    parts: dict[str, Tensor]
    """By the codec's names."""
    error: float = 0.0
    """By :func:`output_error`, with the adapter's start where there is one."""
    pair: Pair | None = None
    """``A`` and ``B`` that an adapter starts at, fp32."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """How a matrix is quantised: what is known of its inputs.

    Args:
        products: XᵀX (in, in) fp32 of the calibration tokens; ``None`` without any.
        tokens: how many these are.
        how: errors are made up for.
    """

    products: Tensor | None
    tokens: int
    how: Compensate

    def upper(self) -> Tensor | None:
        """U of the inverse of H; see :func:`upper_of_inverse`."""
        return None if self.products is None else upper_of_inverse(self.products * (2.0 / self.tokens))


@torch.no_grad()
def quantized(
    weight: Tensor,
    codec: Codec,
    transposed: bool,
    calibrated: Calibrated,
    adapted: Adapted | None = None,
    rounds: int = 1,
) -> Made:
    """Quantise a matrix; under an adapter the best for the inputs of LoftQ's rounds (:mod:`sparselora_dist.method.loftq`).

    Args:
        weight: (out, in), in the model's dtype.
        codec: what it is stored as.
        transposed: whether a stored row is an input.
        calibrated: how.
        adapted: the adapter whose start is asked for.
        rounds: of the alternation.

    Raises:
        ValueError: a value cannot be stored, or the second moments have no Cholesky factor.
    """
    plain = calibrated.how == "none" and not needs_data(codec)
    upper = None if plain and adapted is None else calibrated.upper()

    def encode(matrix: Tensor) -> dict[str, Tensor]:
        rows = matrix.t().contiguous() if transposed else matrix
        if plain:
            return codec.encode(rows, 0)
        assert upper is not None, "calibration is asked for without tokens"
        encoder = encoder_of(codec, rows)
        quantize(encoder, rows.float(), upper, calibrated.how, transposed)
        return encoder.parts()

    def values(parts: dict[str, Tensor]) -> Tensor:
        """As they are computed with."""
        found = decoded(codec, parts, weight.shape[0 if transposed else 1], weight.dtype).float()
        return found.t() if transposed else found

    if adapted is None:
        parts = encode(weight)
        return Made(parts, output_error(weight.float(), values(parts), calibrated.products))
    parts, found = {}, weight

    def stored(target: Tensor) -> Tensor:
        nonlocal parts, found
        parts = encode(target.to(weight.dtype))
        found = values(parts)
        return found

    best: Made | None = None
    for _, pair in alternate(weight, stored, adapted.rank, adapted.scaling, rounds, seed=adapted.seed, upper=upper):
        together = with_adapter(found, pair, adapted.scaling)
        made = Made(parts, output_error(weight.float(), together, calibrated.products), pair)
        # Without data it is what a run makes, the last; codes that inputs make up for need not come nearer every round.
        if best is None or calibrated.products is None or made.error < best.error:
            best = made
    assert best is not None
    return best


def with_adapter(matrix: Tensor, pair: Pair, scaling: float) -> Tensor:
    """What a matrix (out, in) and an adapter's ``A`` and ``B`` compute together, in the matrix' dtype."""
    a, b = pair
    return torch.addmm(matrix.float(), b, a, alpha=scaling).to(matrix.dtype)


def needs_data(codec: Codec) -> bool:
    """Whether a format cannot be made from the weights alone."""
    return isinstance(codec, LevelsCodec) and codec.format == "billm"


def decoded(codec: Codec, parts: dict[str, Tensor], length: int, dtype: torch.dtype) -> Tensor:
    """The stored rows (channels, length) that all parts of a matrix hold."""
    names = codec.parts(length)
    return unpack(codec.stored(tuple(parts[name] for name in names), length)).decode(None, dtype)
