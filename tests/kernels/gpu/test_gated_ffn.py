"""The gated FFN kernels, in Triton's interpreter, equal the plain formulas and torch's gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparselora_kernels import nf4_rows
from sparselora_kernels.gpu import gated_ffn as op
from sparselora_kernels.gpu.indexed_linear import NF4Matrix
from sparselora_kernels.reference.nf4 import LEVELS
from support.compare import assert_close

# (tokens, chosen or None, channels, chosen or None, width): odd sizes, one of everything, all, one channel.
SHAPES = [(9, 5, 21, 4, 70), (1, 1, 1, 1, 1), (20, 17, 33, None, 65), (12, None, 40, 16, 130), (5, 3, 7, 1, 64)]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
weights = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
activations = pytest.mark.parametrize("activation", op.ACTIVATIONS)
# One rounding of the exact result, and the error of fp32 sums of about one.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.bfloat16: (2**-8, 1e-5), torch.float16: (2**-11, 1e-5)}
FORMULA: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def close(name: str, expected: Tensor, got: Tensor) -> None:
    rtol, atol = TOLERANCE[got.dtype]
    assert_close(name, expected, got, rtol=rtol, atol=atol)


def choice(count: int, chosen: int | None) -> Tensor | None:
    return None if chosen is None else torch.randperm(count)[:chosen].sort().values


def every(count: int, index: Tensor | None) -> Tensor:
    return torch.arange(count) if index is None else index


def matrix(channels: int, width: int, index: Tensor | None, dtype: torch.dtype, nf4: bool) -> tuple:
    """A stored matrix, and its chosen rows decoded, in fp64."""
    if not nf4:
        weight = torch.randn(channels, width).to(dtype)
        return weight, weight[every(channels, index)].double()
    blocks = -(-width // 64)
    codes = torch.randint(0, 256, (channels, 32 * blocks), dtype=torch.uint8)
    absmax = torch.rand(channels, blocks) + 0.5
    decoded = nf4_rows(codes, absmax.view(torch.uint8), index, dtype, length=width, double_quant=False)
    return NF4Matrix(codes, absmax[every(channels, index)], torch.tensor(LEVELS), width), decoded.double()


def forward_case(shape: tuple, dtype: torch.dtype, nf4: bool, low: bool) -> tuple:
    """Arguments of gated_forward, its additions, and the exact g and u."""
    tokens, n, channels, k, width = shape
    rows, index = choice(tokens, n), choice(channels, k)
    (gate, gate_rows), (up, up_rows) = (matrix(channels, width, index, dtype, nf4) for _ in range(2))
    x = (torch.randn(tokens, width) / width**0.5).to(dtype)
    here, kept = every(tokens, rows), every(channels, index)
    g, u = x[here].double() @ gate_rows.t(), x[here].double() @ up_rows.t()
    if not low:
        return (x, rows, gate, up, index), {}, g, u
    # Two ranks, neither a multiple of the kernel's step.
    extra = {
        "gate_bias": torch.randn(channels),
        "up_bias": torch.randn(channels),
        "gate_low": torch.randn(tokens, 19) / 4,
        "gate_b": torch.randn(channels, 19),
        "up_low": torch.randn(tokens, 5) / 2,
        "up_b": torch.randn(channels, 5),
    }
    extra = {name: value.to(dtype) for name, value in extra.items()}
    wide = {name: value.double() for name, value in extra.items()}
    g = g + wide["gate_bias"][kept] + wide["gate_low"][here] @ wide["gate_b"][kept].t()
    u = u + wide["up_bias"][kept] + wide["up_low"][here] @ wide["up_b"][kept].t()
    return (x, rows, gate, up, index), extra, g, u


@cases
@weights
@dtypes
@pytest.mark.parametrize("low", [False, True], ids=["base", "bias and low rank"])
def test_forward_equals_formula(shape: tuple, nf4: bool, dtype: torch.dtype, low: bool) -> None:
    arguments, extra, expected_g, expected_u = forward_case(shape, dtype, nf4, low)
    g, u, h = op.gated_forward(*arguments, **extra)
    assert g.dtype == u.dtype == h.dtype == dtype
    close("g", expected_g, g)
    close("u", expected_u, u)
    # Of g and u as they were rounded.
    close("h", F.silu(g.double()) * u.double(), h)


@activations
def test_forward_activations(activation: str) -> None:
    arguments, _, expected_g, expected_u = forward_case(SHAPES[0], torch.float32, False, False)
    h = op.gated_forward(*arguments, activation=activation)[2]
    assert_close("h", FORMULA[activation](expected_g) * expected_u, h)


def test_one_side_with_a_low_rank_product() -> None:
    arguments, extra, _, _ = forward_case(SHAPES[0], torch.float32, False, True)
    alone = op.gated_forward(*arguments, up_low=extra["up_low"], up_b=extra["up_b"])
    plain, both = op.gated_forward(*arguments), op.gated_forward(*arguments, **extra)
    assert torch.equal(alone[0], plain[0])
    expected = both[1] - extra["up_bias"][arguments[4]]
    assert_close("u", expected, alone[1], atol=1e-5)


@activations
@dtypes
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 700)], ids=str)
def test_backward_equals_autograd(activation: str, dtype: torch.dtype, shape: tuple) -> None:
    dh, g, u = (torch.randn(shape).mul(3).to(dtype) for _ in range(3))
    g.view(-1)[0] = 0.0
    gate, up = g.double().requires_grad_(), u.double().requires_grad_()
    (FORMULA[activation](gate) * up).backward(dh.double())
    dg, du = op.gated_backward(dh, g, u, activation)
    assert dg.dtype == du.dtype == dtype
    close("dg", gate.grad, dg)
    close("du", up.grad, du)


@activations
def test_backward_far_from_zero(activation: str) -> None:
    g = torch.tensor([-1e4, -90.0, -20.0, 20.0, 90.0, 1e4])
    gate = g.double().requires_grad_()
    FORMULA[activation](gate).sum().backward()
    one = torch.ones_like(g)
    dg, du = op.gated_backward(one, g, one, activation)
    close("dg", gate.grad, dg)
    close("du", FORMULA[activation](g.double()), du)


@cases
@weights
@dtypes
def test_input_gradient_equals_formula(shape: tuple, nf4: bool, dtype: torch.dtype) -> None:
    tokens, n, channels, k, width = shape
    rows, index = choice(tokens, n), choice(channels, k)
    (gate, gate_rows), (up, up_rows) = (matrix(channels, width, index, dtype, nf4) for _ in range(2))
    here, kept = every(tokens, rows), every(channels, index)
    dg, du = ((torch.randn(here.numel(), kept.numel()) / kept.numel() ** 0.5).to(dtype) for _ in range(2))
    product = dg.double() @ gate_rows + du.double() @ up_rows
    before = torch.randn(tokens, width).to(dtype)
    untouched = torch.ones(tokens, dtype=torch.bool)
    untouched[here] = False
    for accumulate in (False, True):
        out, exact = before.clone(), before.double()
        exact[here] = product + (exact[here] if accumulate else 0)
        assert op.gated_input_gradient(dg, du, gate, up, rows, index, out, accumulate) is out
        close(f"accumulate={accumulate}", exact, out)
        assert torch.equal(out[untouched], before[untouched])


def tiles(tables: dict) -> list:
    return [
        pytest.param(kind, place, id=f"{kind} {tile.m}x{tile.n}x{tile.k}")
        for kind, table in tables.items()
        for place, tile in enumerate(table)
    ]


def forced(monkeypatch: pytest.MonkeyPatch, tables: dict, kind: str, place: int) -> tuple:
    """Chosen channels of 100, dtype and NF4 of a case that launches this tile and no other."""
    tile = tables[kind][place]
    for name in tables:
        monkeypatch.setitem(tables, name, (tile,) if name == kind else ())
    return 17 if "ragged" in kind else 80, torch.bfloat16 if kind.startswith("16") else torch.float32, "nf4" in kind


@pytest.mark.parametrize("kind, place", tiles(op.FORWARD_TILES))
def test_every_forward_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    k, dtype, nf4 = forced(monkeypatch, op.FORWARD_TILES, kind, place)
    arguments, extra, expected_g, expected_u = forward_case((41, 33, 100, k, 70), dtype, nf4, True)
    g, u, _ = op.gated_forward(*arguments, **extra)
    close("g", expected_g, g)
    close("u", expected_u, u)


@pytest.mark.parametrize("kind, place", tiles(op.GRADIENT_TILES))
def test_every_gradient_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    k, dtype, nf4 = forced(monkeypatch, op.GRADIENT_TILES, kind, place)
    index = choice(100, k)
    (gate, gate_rows), (up, up_rows) = (matrix(100, 70, index, dtype, nf4) for _ in range(2))
    dg, du = ((torch.randn(33, k) / k**0.5).to(dtype) for _ in range(2))
    out = op.gated_input_gradient(dg, du, gate, up, None, index, torch.empty(33, 70, dtype=dtype))
    close("out", dg.double() @ gate_rows + du.double() @ up_rows, out)


@weights
def test_gradients_of_the_whole(nf4: bool) -> None:
    """Forward, backward and input gradient together are autograd's gradient of the formula."""
    arguments, _, _, _ = forward_case(SHAPES[0], torch.float32, nf4, False)
    x, rows, gate, up, index = arguments
    identity = torch.eye(70)
    empty = torch.empty(index.numel(), 70)
    gate_rows, up_rows = (
        op.gated_input_gradient(torch.eye(4), torch.zeros(4, 4), w, w, None, index, empty.clone()) for w in (gate, up)
    )
    wide = x.double().requires_grad_()
    hidden = F.silu(wide[rows] @ gate_rows.double().t()) * (wide[rows] @ up_rows.double().t())
    dh = torch.randn(hidden.shape)
    hidden.backward(dh.double())
    g, u, _ = op.gated_forward(*arguments)
    dg, du = op.gated_backward(dh, g, u)
    out = op.gated_input_gradient(dg, du, gate, up, rows, index, torch.zeros_like(x))
    assert_close("grad x", wide.grad, out, rtol=1e-5, atol=1e-5)
    # The same decoded rows by the forward kernel.
    g, _, _ = op.gated_forward(identity, None, gate, up, index)
    assert torch.equal(g.t(), gate_rows)


@weights
def test_nothing_to_do(nf4: bool) -> None:
    none, rows = torch.empty(0, dtype=torch.int64), torch.tensor([1, 3])
    (gate, _), (up, _) = (matrix(6, 70, none, torch.float32, nf4) for _ in range(2))
    x, before = torch.randn(5, 70), torch.randn(5, 70)
    assert [part.shape for part in op.gated_forward(x, none, gate, up, none)] == [(0, 0)] * 3
    assert [part.shape for part in op.gated_forward(x, rows, gate, up, none)] == [(2, 0)] * 3
    empty = torch.empty(0, 4)
    assert [part.shape for part in op.gated_backward(empty, empty, empty)] == [(0, 4)] * 2
    for chosen, expected in ((none, before), (rows, before.index_fill(0, rows, 0.0))):
        grad = torch.empty(chosen.numel(), 0)
        assert torch.equal(op.gated_input_gradient(grad, grad, gate, up, chosen, none, before.clone()), expected)


@weights
@dtypes
def test_runs_are_bit_identical(nf4: bool, dtype: torch.dtype) -> None:
    arguments, extra, _, _ = forward_case(SHAPES[0], dtype, nf4, True)
    x, rows, gate, up, index = arguments
    runs = []
    for _ in range(2):
        g, u, h = op.gated_forward(*arguments, **extra)
        dg, du = op.gated_backward(h, g, u)
        runs.append((g, u, h, dg, du, op.gated_input_gradient(dg, du, gate, up, rows, index, torch.zeros_like(x))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_refusals() -> None:
    x, weight = torch.randn(3, 70), torch.randn(5, 70)
    nf4, _ = matrix(5, 70, None, torch.float32, True)
    with pytest.raises(ValueError, match=r"'swish'.*silu"):
        op.gated_forward(x, None, weight, weight, None, activation="swish")
    with pytest.raises(ValueError, match="low and b"):
        op.gated_forward(x, None, weight, weight, None, up_b=torch.randn(5, 2))
    with pytest.raises(ValueError, match="both plain or both NF4"):
        op.gated_forward(x, None, weight, nf4, None)
    with pytest.raises(ValueError, match="gate is 5 x 70, up is 4 x 70"):
        op.gated_forward(x, None, weight, weight[:4], None)
