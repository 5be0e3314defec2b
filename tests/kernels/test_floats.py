"""float_rows equals its reference to the bit, for any rows, whoever shares their scales."""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels import EncodedWeight, floats, reference, rows_of
from sparselora_kernels.floats import E4M3, E4M3_OVER, E8M0, code_values, scale_values
from sparselora_kernels.reference.floats import e2m1, e4m3, e8m0
from sparselora_kernels.stored import weight_of
from support.kernel_cases import FLOAT_FORMATS
from support.kernel_cases import floats as some_floats

CPU = torch.device("cpu")
formats = pytest.mark.parametrize("form", FLOAT_FORMATS, ids=str)


def decoded_by_reference(weight: EncodedWeight, channels: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    rows, scales, *whole = weight.parts
    names = ("length", "bits", "scale", "block", "every")
    options = dict(zip(names, weight.layout[1:])) | {"first": weight.first}
    return reference.float_rows(rows, scales, whole[0] if whole else None, channels, dtype, **options)


@formats
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 50), (2, 300)], ids=str)
def test_equals_reference(form: tuple, shape: tuple[int, int]) -> None:
    weight = some_floats(shape, *form)
    last = shape[0] - 1
    some = torch.tensor([17]) if last > 5 else None
    for channels in (torch.tensor([last, 0, last]), torch.empty(0, dtype=torch.int64), some):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            got = weight.decode(channels, dtype)
            assert got.dtype == dtype and torch.equal(got, decoded_by_reference(weight, channels, dtype))


@formats
def test_chosen_rows_are_rows_of_the_whole(form: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the matrix, and of a matrix inside it that begins in the middle of a block of channels; decoded in several goes."""
    weight = some_floats((301, 70), *form)
    whole = weight.decode(None, torch.float32)
    assert whole.shape == (301, 70) and whole.isfinite().all()
    monkeypatch.setattr(floats, "_CHUNK", 70 * 9)
    assert torch.equal(weight.decode(None, torch.float32), whole)
    chosen = torch.randperm(301)[:40].sort().values
    assert torch.equal(weight.decode(chosen, torch.float32), whole[chosen])
    inner = rows_of(weight, slice(130, 300))
    inner = weight_of(inner.parts, inner.layout)
    assert torch.equal(inner.decode(None, torch.float32), whole[130:300])
    chosen = torch.tensor([0, 5, 5, 169])
    assert torch.equal(inner.decode(chosen, torch.float32), whole[130:300][chosen])


def test_parts_of_a_larger_buffer() -> None:
    """Gathered parameters may begin at any byte, and rows may be further apart than they are wide."""
    for form in FLOAT_FORMATS:
        weight = some_floats((9, 48), *form)
        moved = [torch.nn.functional.pad(part, (3, 2))[:, 3:-2] for part in weight.parts]
        got = EncodedWeight(moved, weight.layout).decode(torch.tensor([1, 8]), torch.float32)
        assert torch.equal(got, weight.decode(torch.tensor([1, 8]), torch.float32))


def test_schema_and_fake_result() -> None:
    weight = some_floats((5, 33), 4, E4M3, 16, 1)
    for channels in (None, torch.tensor([4, 1])):
        arguments = (*weight.parts, channels, torch.bfloat16, list(weight.layout[1:6]), 0)
        torch.library.opcheck(torch.ops.sparselora.float_rows, arguments)


def test_every_code_and_every_scale() -> None:
    """By the formula of each, and by torch's own types."""
    byte = torch.arange(256, dtype=torch.uint8)
    for formula, bits, found in (
        (e4m3, 8, code_values(8, CPU)), (e2m1, 4, code_values(4, CPU)),
        (e4m3, 8, scale_values(E4M3, CPU)), (e8m0, 8, scale_values(E8M0, CPU)),
    ):  # fmt: skip
        expected = torch.tensor([formula(i) for i in range(1 << bits)])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    own = byte.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(code_values(8, CPU), own, rtol=0, atol=0, equal_nan=True)
    own = byte.view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(scale_values(E8M0, CPU), own, rtol=0, atol=0, equal_nan=True)


def test_the_scale_of_nvfp4_is_rounded_before_its_product() -> None:
    """As those who write such files decode them: (code · (scale · whole)), which is not ((code · scale) · whole)."""
    weight = some_floats((64, 64), 4, E4M3, 16, 1)
    rows, scales, whole = weight.parts
    values = code_values(4, CPU)[torch.stack([rows & 15, rows >> 4], 2).view(64, 64).int()]
    blocks = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    factor = whole.view(torch.float32)
    got = weight.decode(None, torch.float32)
    assert torch.equal(got, values * (blocks * factor)) and not torch.equal(got, values * blocks * factor)


def test_a_scale_that_divides_is_not_its_reciprocal() -> None:
    weight = some_floats((64, 64), 4, E4M3_OVER, 16, 1)
    rows, scales, whole = weight.parts
    values = code_values(4, CPU)[torch.stack([rows & 15, rows >> 4], 2).view(64, 64).int()]
    blocks = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    factor = whole.view(torch.float32)
    got = weight.decode(None, torch.float32)
    assert torch.equal(got, values * (blocks / factor)) and not torch.equal(got, values * (blocks * (1 / factor)))
