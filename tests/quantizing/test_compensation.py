"""What later inputs make up for: less error in the outputs, in every format and in both orientations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sparselora_dist.codecs import codec_named
from sparselora_dist.layerwise.model_files import ModelFiles
from sparselora_dist.layerwise.second_moments import upper_of_inverse
from sparselora_dist.layerwise.statistics import Inputs
from sparselora_dist.quantizing.compensation import Compensate, output_error, quantize
from sparselora_dist.quantizing.encoders import encoder_of
from sparselora_dist.quantizing.matrix import Calibrated, decoded, quantized, with_adapter

FORMATS = [("billm", 2), ("hqq", 2), ("hqq", 4), ("bcq", 2), ("bcq", 3), ("shiftadd", 3), ("fp8", 8)]
INPUTS, OUTPUTS, TOKENS = 320, 150, 1500
MODES = ("none", "diagonal", "exact")
assert set(MODES) == set(get_args(Compensate))


@pytest.fixture(scope="module")
def products() -> Tensor:
    """XᵀX of correlated inputs, a few of them large, one that no token has."""
    torch.manual_seed(1)
    x = torch.randn(TOKENS, INPUTS) @ (torch.randn(INPUTS, INPUTS) * torch.arange(1.0, INPUTS + 1).rsqrt()[:, None])
    x[:, 5] = 0
    return x.t() @ x


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
@pytest.mark.parametrize(("name", "bits"), FORMATS)
def test_exact_is_better_than_diagonal_than_none(name: Any, bits: int, across: bool, products: Tensor) -> None:
    weight = torch.randn(OUTPUTS, INPUTS) * 0.02
    rows = weight.t().contiguous() if across else weight
    codec, upper = codec_named(name, bits), upper_of_inverse(products * (2 / TOKENS))
    errors = []
    for how in MODES:
        encoder = encoder_of(codec, rows)
        found = quantize(encoder, rows, upper, how, across)  # type: ignore[arg-type]
        parts = encoder.parts()
        assert torch.equal(decoded(codec, parts, rows.shape[1], torch.float32), found), (
            "what is stored is what was meant"
        )
        sizes = {name: (part.rows(len(rows)), part.width) for name, part in codec.parts(rows.shape[1]).items()}
        assert {part: tuple(value.shape) for part, value in parts.items()} == sizes
        errors.append(output_error(weight, found.t() if across else found, products))
    none, diagonal, exact = errors
    assert exact < 0.8 * diagonal and diagonal < 0.9 * none, errors


def test_without_correlations_there_is_nothing_to_make_up_for() -> None:
    weight, products = torch.randn(40, 256), torch.eye(256) * 50
    billm = codec_named("billm", 2)
    found = [quantized(weight, billm, False, Calibrated(products, 100, how)) for how in MODES]  # type: ignore[arg-type]
    for one, other in pairwise(found):
        assert one.error == other.error and all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


@dataclass(frozen=True)
class Rank16:
    rank: int = 16
    scaling: float = 2.0
    seed: int = 0


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
def test_under_an_adapter_less_is_left(across: bool, products: Tensor) -> None:
    """And never more by more rounds; the figure is that of the codes and the start together."""
    weight, billm, calibrated = (
        torch.randn(OUTPUTS, INPUTS) * 0.02,
        codec_named("billm", 2),
        Calibrated(products, TOKENS, "exact"),
    )
    errors = [quantized(weight, billm, across, calibrated).error]
    for rounds in (1, 4):
        made = quantized(weight, billm, across, calibrated, Rank16(), rounds)
        rows = decoded(billm, made.parts, OUTPUTS if across else INPUTS, torch.float32)
        assert made.pair
        found = with_adapter(rows.t() if across else rows, made.pair, 2.0)
        assert made.error == pytest.approx(output_error(weight, found, products), rel=1e-4)
        errors.append(made.error)
    assert errors[2] <= errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("name", ["v_proj", "down_proj"])
def test_on_a_trained_model(name: str, shared: Path) -> None:
    """The error of one of its matrices, of the outputs for its own inputs."""
    source = ModelFiles.open(str(shared / "models" / "base-9m"), torch.device("cpu"))
    sequences = source.sequences(str(shared / "data" / "math" / "train.jsonl"), 4, 256).sequences
    layer = source.stream.layers[2]
    hidden, calls = source.stream.embed(sequences)
    linear: Any = layer.matrix(name)
    with source.stream.filled(layer):
        inputs = Inputs({name: linear}, "products")
        inputs.begin_part()
        for one in hidden:
            source.stream.run(layer, one, calls[2])
        inputs.close()
        products = inputs.sums[0][name]
        for codec in (codec_named("billm", 2), codec_named("bcq", 3), codec_named("fp8", 8)):
            errors = [
                quantized(linear.weight, codec, name == "down_proj", Calibrated(products, sequences.numel(), how)).error  # type: ignore[arg-type]
                for how in MODES
            ]
            assert errors[2] < errors[1] < errors[0], (codec.name, errors)
