"""The zeros of a stored matrix: of NF4 those of its codes, and nothing else is touched where they are kept."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import EncodedWeight, nonzero, reference
from sparselora_kernels.masked_weight import masked_weight
from sparselora_kernels.nonzero import keep_nonzero
from support.kernel_cases import floats, implementations, nf4, pruned, running, some

SHAPES = [(1, 1), (7, 100), (33, 130), (40, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stored", ["plain", "nf4"])
def test_equals_reference(shape: tuple[int, int], stored: str) -> None:
    weight = pruned(shape)
    found = nf4(weight)[0] if stored == "nf4" else weight
    values = nf4(weight)[1] if stored == "nf4" else weight
    for channels in (None, some(shape[0], shape[0] // 2), torch.tensor([shape[0] - 1])):
        assert torch.equal(nonzero(found, channels), reference.nonzero(values, channels))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stored", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@implementations
def test_what_is_kept_is_the_same_bits(
    shape: tuple[int, int], stored: str, dtype: torch.dtype, implementation: str
) -> None:
    weight = pruned(shape).to(dtype)
    found = nf4(weight.float())[0] if stored == "nf4" else weight
    for channels in (None, some(shape[0], shape[0] // 2)):
        mask = nonzero(found, channels)
        values = torch.randn(mask.shape).to(dtype)
        with running(implementation):
            got = keep_nonzero(values.clone(), found, channels)
        assert torch.equal(got, values.masked_fill(~mask, 0))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_block_whose_scale_is_zero_is_pruned_only_where_its_code_is(double_quant: bool) -> None:
    """Decoded it is all zeros; the codes still know which were."""
    (codes, scales), layout = nf4(pruned((4, 128)), double_quant=double_quant)[0][:2]
    flat = scales.clone().zero_()
    stored = EncodedWeight((codes, flat), layout)
    assert not stored.decode(None, torch.float32).any()
    assert torch.equal(nonzero(stored), nonzero(EncodedWeight((codes, scales), layout)))
    assert 0 < nonzero(stored).double().mean() < 1


def test_negative_zero_is_zero() -> None:
    weight = torch.tensor([[-0.0, 0.0, -1.0, 1.0]])
    assert nonzero(weight).tolist() == [[False, False, True, True]]
    assert keep_nonzero(torch.ones(1, 4), weight).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("form", [(8, 0, 0, 1), (4, 1, 16, 1), (4, 2, 32, 1)], ids=["fp8", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(7, 101), (33, 130)], ids=str)
@implementations
def test_zeros_of_fp8_and_fp4_are_those_of_their_codes(
    form: tuple, shape: tuple[int, int], implementation: str
) -> None:
    """Both zeros, whatever the scale; the weight of a masked adapter keeps them."""
    rows, *scales = floats(shape, *form).parts
    rows[torch.rand(rows.shape) < 0.3] = 0
    rows[torch.rand(rows.shape) < 0.1] = 0x80 if form[0] == 8 else 0x88
    scales[0][0] = 0
    stored = EncodedWeight((rows, *scales), floats(shape, *form).layout)
    one = torch.tensor([[1.0]]).view(torch.uint8)
    alone = EncodedWeight((rows, one, one)[: 3 if form[1] == 1 else 2], (3, shape[1], form[0], 0, 0, 0, 0))
    expected = alone.decode(None, torch.float32) != 0
    for channels in (None, some(shape[0], 5), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(nonzero(stored, channels), expected if channels is None else expected[channels])
    p, q = torch.randn(shape[0], 2), torch.randn(2, shape[1])
    with running(implementation):
        got = masked_weight(stored, p, q, 0.5)
    dense = torch.addmm(stored.decode(None, torch.float32), p, q, alpha=0.5)
    assert torch.equal(got, dense.where(expected, 0)) and 0 < expected.double().mean() < 1


def test_a_format_without_a_code_for_zero_is_refused() -> None:
    weight = EncodedWeight((torch.zeros(4, 32, dtype=torch.uint8),), (2, 128, 0, 2))
    for call in (lambda: nonzero(weight), lambda: keep_nonzero(torch.ones(4, 128), weight)):
        with pytest.raises(ValueError, match=r'has no code for zero.*set quantization\.format "nf4" or "fp8"'):
            call()
