"""Products in fp8: exact where nothing has to be rounded, and every operation within fp8's error of the decoded product.

On a CPU, by a stand-in for ``torch._scaled_mm`` that asserts what a GPU demands of shapes, strides, dtypes and alignment.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sparselora_kernels as kernels
from sparselora_dist.codecs import FloatsCodec
from sparselora_kernels import EncodedWeight, float_layout, formats, lora_linear, rows_of
from sparselora_kernels.backend import use_fp8
from sparselora_kernels.indexed_linear import product_nn, product_nt
from sparselora_kernels.stored import unpack, weight_of
from support.fp8_product import fp8_products, scaled_mm
from support.kernel_cases import implementations, results, running, some, split

# A scale per channel, for all, and per channel of a matrix that is stored transposed.
SCALES = [(0, 1), (0, 0), (1, 0)]
BF16 = torch.bfloat16


def small_integers(n: int, factors: Tensor) -> Tensor:
    """(n, m) of -7 ... 7, and 7 in every row where the factor (m,) is largest, so that fp8 holds each times its factor: the
    largest magnitude becomes 448, which is 7 times a power of two."""
    values = torch.randint(-7, 8, (n, factors.shape[0])).float()
    if factors.shape[0]:
        values[:, factors.argmax()] = 7
    return values


def exact(channels: int, length: int, block: int, every: int) -> EncodedWeight:
    """A matrix of small integers in fp8, with scales that are 1, 2 or 4 by their position."""
    count = length if block else channels if every else 1
    scales = 2.0 ** (torch.arange(count) % 3)
    scales = scales.view(1, -1) if block else scales.view(-1, 1)
    codes = small_integers(channels, torch.ones(length)).to(torch.float8_e4m3fn).view(torch.uint8)
    return EncodedWeight((codes, scales.view(torch.uint8)), float_layout(length, 8, 0, block, every, True))


def factors(weight: EncodedWeight, channels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the operands of nt (in,) and of nn (k,) are multiplied with."""
    scales = weight.parts[1].view(torch.float32).view(-1)
    by_column = weight.layout[4] == 1
    rows = torch.arange(weight.channels) if channels is None else channels
    by_channel = torch.ones(len(rows)) if by_column else scales.expand(weight.channels)[rows]
    return scales if by_column else torch.ones(weight.length), by_channel


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("size", [(32, 48), (37, 50), (1, 1)], ids=str)
@implementations
def test_nothing_is_lost_where_fp8_holds_all_numbers(
    scales: tuple[int, int], size: tuple[int, int], implementation: str
) -> None:
    """In both directions: scales on either side, chosen channels, sides that 16 does not divide, no token, no channel."""
    weight = exact(*size, *scales)
    for channels in (None, some(size[0], size[0] // 2 + 1), torch.empty(0, dtype=torch.int64)):
        for product, factor in zip((product_nt, product_nn), factors(weight, channels)):
            for tokens in (5, 0):
                operand = small_integers(tokens, factor)
                expected = product(operand, weight, channels).to(BF16)
                with fp8_products() as inside, running(implementation):
                    got = product(operand.to(BF16), weight, channels)
                assert inside.called == (tokens > 0 and (channels is None or len(channels) > 0))
                assert got.dtype == BF16 and got.is_contiguous() and torch.equal(got, expected)


def test_a_bias_is_that_of_the_channels() -> None:
    weight, channels = exact(37, 50, 0, 1), some(37, 9)
    x, h = (small_integers(4, factor) for factor in factors(weight, channels))
    wide, long = torch.randn(37), torch.randn(50)
    with fp8_products():
        got = product_nt(x.to(BF16), weight, channels, wide), product_nn(h.to(BF16), weight, channels, long)
        onto = torch.ones(4, 50, dtype=BF16)
        same = product_nn(h.to(BF16), weight, channels, onto=onto)
        empty = product_nn(h.to(BF16)[:, :0], weight, channels[:0], long)
    assert torch.allclose(got[0].float(), product_nt(x, weight, channels, wide), rtol=0.01, atol=0.01)
    assert torch.allclose(got[1].float(), product_nn(h, weight, channels, long), rtol=0.01, atol=0.01)
    assert same is onto and torch.allclose(onto.float(), product_nn(h, weight, channels) + 1, rtol=0.01)
    assert torch.equal(empty, long.to(BF16).expand(4, 50))


def test_rows_inside_a_matrix_and_at_any_address() -> None:
    """A gate inside a matrix of gate and up; gathered bytes that begin anywhere, rows further apart than they are wide."""
    for block, every in SCALES:
        weight = exact(48, 32, block, every)
        x = small_integers(4, factors(weight)[0])
        expected = product_nt(x, weight).to(BF16)[:, 17:40]
        moved = [torch.nn.functional.pad(part, (3, 2))[:, 3:-2] for part in weight.parts]
        inner = rows_of(EncodedWeight(moved, weight.layout), slice(17, 40))
        with fp8_products():
            assert torch.equal(product_nt(x.to(BF16), weight_of(inner.parts, inner.layout)), expected)


def test_what_is_not_finite_stays_so_in_its_row_alone() -> None:
    weight, x = exact(16, 32, 0, 1), small_integers(4, torch.ones(32))
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for implementation in ("torch", "triton"):
        with fp8_products(), running(implementation):
            got = product_nt(x.to(BF16), weight)
        assert got.isfinite().all(1).tolist() == [True, False, False, True]


def test_where_it_is_decoded() -> None:
    """Not asked for, computed in another dtype, scales by blocks of 128: the decoded product to the bit."""
    codec, matrix, x = FloatsCodec(compute=False), torch.randn(48, 32), torch.randn(5, 32)
    rows, scales = codec.encode(matrix, 0).values()
    unasked = codec.whole(matrix)
    blocks = EncodedWeight((rows, scales[:1].contiguous()), float_layout(32, 8, 0, 128, 128, True))
    asked = FloatsCodec().whole(matrix)
    for weight, dtype in ((unasked, BF16), (blocks, BF16), (asked, torch.float32), (asked, torch.float16)):
        with fp8_products() as inside:
            got = product_nt(x.to(dtype), weight)
        assert not inside.called
        assert torch.equal(got, x.to(dtype) @ weight.decode(None, dtype).t())


def test_the_stand_in_multiplies_as_torch_does() -> None:
    """Which has the product on some CPUs too, and asks for less there."""
    left, right = (torch.randn(n, 32).to(torch.float8_e4m3fn) for n in (5, 48))
    arguments = left, right.t(), torch.rand(5, 1), torch.rand(1, 48)
    for bias in (None, torch.randn(48).to(BF16)):
        try:
            own = torch._scaled_mm(*arguments, bias=bias, out_dtype=BF16)
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"torch {torch.__version__} has no such product on this CPU: {error}")
        torch.testing.assert_close(scaled_mm(*arguments, bias=bias, out_dtype=BF16), own, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_on_a_gpu_nothing_is_lost_either(scales: tuple[int, int]) -> None:
    """The real product, and the compiled kernels: what the stand-in cannot know."""
    device = torch.device("cuda")
    if not use_fp8(torch.empty(0, device=device)):
        pytest.skip("this GPU does not multiply fp8")
    for size in ((256, 512), (37, 50)):
        weight = exact(*size, *scales)
        there = EncodedWeight([part.to(device) for part in weight.parts], weight.layout)
        for channels in (None, some(size[0], size[0] // 2 + 1)):
            moved = None if channels is None else channels.to(device)
            for product, factor in zip((product_nt, product_nn), factors(weight, channels)):
                for tokens in (300, 1):
                    operand = small_integers(tokens, factor)
                    got = product(operand.to(device, BF16), there, moved)
                    assert torch.equal(got.cpu(), product(operand, weight, channels).to(BF16))


def test_flops_are_those_of_the_decoded_product() -> None:
    counts = []
    for context in (nullcontext(), fp8_products()):
        with context, FlopCounterMode(display=False) as counter:
            lora_linear(torch.ones(32, 48, dtype=BF16, requires_grad=True), exact(64, 48, 0, 1), None).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 32 * 48 * 64
    assert torch.ops.aten._scaled_mm in flop_registry


# --- every operation with a stored matrix


def fp8(weight: Tensor, block: int = 0) -> EncodedWeight:
    """In fp8; with scales along the rows where ``block`` is 1."""
    if not block:
        return FloatsCodec().whole(weight)
    turned = FloatsCodec().encode(weight.t().contiguous(), 0)
    parts = turned["rows"].t().contiguous(), turned["scales"].view(1, -1)
    return unpack(FloatsCodec(block=1, every=0).stored(parts, weight.shape[1]))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def lora_case(transposed: bool, sparse: bool, rank: int, block: int) -> tuple[Any, dict, dict]:
    inputs, outputs = (40, 60) if transposed else (60, 40)
    trained: dict[str, Any] = {"x": numbers(20, inputs)}
    if rank:
        trained |= {"a": numbers(rank, inputs) / 8, "b": numbers(outputs, rank) / 8}
    fixed: dict[str, Any] = {
        "weight": fp8(torch.randn(40, 60), block),
        "bias": numbers(outputs),
        "transposed": transposed,
    }
    if sparse:
        fixed |= dict(zip(("dense_rows", "context_rows"), split(7, 10, 3)), channels=some(40, 21))
    return kernels.lora_linear, trained, fixed


def joined_case(dense: int) -> tuple[Any, dict, dict]:
    def call(x: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, **fixed: Any) -> Any:
        return kernels.lora_joined(x, a=(a0, a1, a2), b=(b0, b1, b2), **fixed)

    trained = {"x": numbers(20, 60)}
    for i, outputs in enumerate((40, 24, 24)):
        trained |= {f"a{i}": numbers(3, 60) / 8, f"b{i}": numbers(outputs, 3) / 8}
    rows = split(dense, 17 - dense, 3)
    fixed = {
        "weights": [fp8(torch.randn(outputs, 60)) for outputs in (40, 24, 24)], "biases": [numbers(40), None, None],
        "scalings": (0.5, 1.0, 2.0), "dense_rows": rows[0], "context_rows": rows[1],
        "channels": (some(40, 11), some(24, 16), None),
    }  # fmt: skip
    return call, trained, fixed


def ffn_case(operation: str, dense: int) -> tuple[Any, dict, dict]:
    rows = split(dense, 17 - dense, 3)
    lists = {"dense_rows": rows[0], "context_rows": rows[1], "channels": some(60, 33)}
    if operation == "ffn_down":
        trained = {"h_dense": numbers(dense, 60), "h_context": numbers(17 - dense, 33)}
        return (
            kernels.ffn_down,
            trained,
            {"weight": fp8(torch.randn(60, 40)), "bias": numbers(40), "tokens": 20} | lists,
        )
    trained = {"x": numbers(20, 40)}
    if operation == "ffn_up":
        trained |= {"low": numbers(20, 2), "b": numbers(60, 2)}
        return kernels.ffn_up, trained, {"weight": fp8(torch.randn(60, 40)), "bias": numbers(60)} | lists
    both = fp8(torch.randn(120, 40))
    pair = {"gate": rows_of(both, slice(0, 60)), "up": rows_of(both, slice(60, 120)), "up_bias": numbers(60)}
    return kernels.gated_up, trained, pair | lists


CASES: dict[str, Any] = {
    "linear": lambda: lora_case(False, False, 3, 0),
    "linear, transposed": lambda: lora_case(True, False, 3, 0),
    "q": lambda: lora_case(False, True, 3, 0),
    "o": lambda: lora_case(True, True, 3, 0),
    "o from a file": lambda: lora_case(True, True, 0, 1),
    "q, k and v": lambda: joined_case(7),
    "q, k and v, no dense token": lambda: joined_case(0),
    "gate and up": lambda: ffn_case("gated_up", 7),
    "gate and up, no dense token": lambda: ffn_case("gated_up", 0),
    "up": lambda: ffn_case("ffn_up", 7),
    "down": lambda: ffn_case("ffn_down", 7),
}


@pytest.mark.parametrize(
    ("case", "implementation"), [*((case, "torch") for case in CASES), ("q", "triton"), ("o", "triton")]
)
def test_operations_are_within_the_error_of_fp8(case: str, implementation: str) -> None:
    """Outputs and gradients against the decoded products; nothing is decoded on the way."""
    operation, trained, fixed = CASES[case]()
    expected = results(operation, trained, **fixed)
    forbidden = mock.patch.object(formats, "float_rows", side_effect=AssertionError("an fp8 matrix was decoded"))
    with fp8_products() as inside, running(implementation), forbidden:
        got = results(operation, trained, **fixed)
    assert inside.called and got.keys() == expected.keys()
    different = []
    for name, value in expected.items():
        found = got[name]
        assert found.dtype == value.dtype and found.shape == value.shape
        error = float((found.float() - value.float()).norm() / value.float().norm().clamp(min=1e-9))
        # Each operand is rounded to three bits of mantissa, 2.7 % of its norm where its numbers are normal.
        assert error < 0.06, (name, error)
        different.append(error > 0.005)
    assert any(different)
