"""LoftQ's start over every format that is made on load: nearer to the weights than the stored matrix alone."""

from __future__ import annotations

import pytest
import torch

from sparselora_dist.codecs import codec_named
from sparselora_dist.config.quantization import BITS, READ_ONLY, Format
from sparselora_dist.method.loftq import alternate, less

MADE: list[tuple[Format, int]] = [(name, bits) for name in BITS if name not in READ_ONLY for bits in BITS[name]]  # type: ignore[misc]


@pytest.mark.parametrize(("name", "bits"), MADE, ids=lambda value: str(value))
@pytest.mark.parametrize("shape", [(64, 256), (96, 200)], ids=str)
def test_the_start_makes_up_for_some_of_what_storage_takes(name: Format, bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    codec, weight = codec_named(name, bits), torch.randn(shape) * 0.02
    plain, errors = (weight - codec.roundtrip(weight)).norm(), []
    for rounds in (1, 4):
        *_, (shift, (a, b)) = alternate(weight, codec.roundtrip, 16, 2.0, rounds)
        stored = codec.roundtrip(less(weight, *shift) if shift else weight)
        errors.append(float((weight - stored - 2.0 * b @ a).norm() / plain))
    assert max(errors) < 0.9, errors
    # Half-quadratic splitting at 2 bits does not look for the nearest values, and more rounds need not help it.
    assert errors[1] < errors[0] or (name, bits) == ("hqq", 2), errors
