"""Every tile of the gated FFN's kernels, in Triton's interpreter, and what only the launchers take or refuse.

Sizes, activations and gradients are those of the public operation: tests/kernels/test_gated_ffn.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparselora_kernels.activations import ACTIVATIONS
from sparselora_kernels.gpu import gated_ffn as op
from sparselora_kernels.gpu import gated_gradient as gradient
from sparselora_kernels.gpu.gated_gradient import GRADIENT_TILES
from support.compare import assert_close
from support.kernel_cases import some
from support.tile_cases import close, matrix, only, tiles, weights

TOKENS, CHOSEN, CHANNELS, WIDTH = 41, 33, 100, 70
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
FORMULA: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def forward_case(k: int, dtype: torch.dtype, nf4: bool) -> tuple:
    """Arguments of gated_forward, its additions, and the exact g and u."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    (gate, gate_rows), (up, up_rows) = (matrix(CHANNELS, WIDTH, index, dtype, nf4) for _ in range(2))
    x = (torch.randn(TOKENS, WIDTH) / WIDTH**0.5).to(dtype)
    # Two ranks, neither a multiple of the kernel's step.
    extra = {
        "gate_bias": torch.randn(CHANNELS),
        "up_bias": torch.randn(CHANNELS),
        "gate_low": torch.randn(TOKENS, 19) / 4,
        "gate_b": torch.randn(CHANNELS, 19),
        "up_low": torch.randn(TOKENS, 5) / 2,
        "up_b": torch.randn(CHANNELS, 5),
    }
    extra = {name: value.to(dtype) for name, value in extra.items()}
    wide = {name: value.double() for name, value in extra.items()}
    g, u = (
        x[rows].double() @ weight.t()
        + wide[f"{name}_bias"][index]
        + wide[f"{name}_low"][rows] @ wide[f"{name}_b"][index].t()
        for name, weight in (("gate", gate_rows), ("up", up_rows))
    )
    return (x, rows, gate, up, index), extra, g, u


def gradient_case(k: int, dtype: torch.dtype, nf4: bool) -> tuple:
    """Arguments of gated_input_gradient but for ``out``, and the exact result."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    (gate, gate_rows), (up, up_rows) = (matrix(CHANNELS, WIDTH, index, dtype, nf4) for _ in range(2))
    dg, du = ((torch.randn(CHOSEN, k) / k**0.5).to(dtype) for _ in range(2))
    return (dg, du, gate, up, rows, index), dg.double() @ gate_rows + du.double() @ up_rows


def kept(kind: str) -> int:
    return 17 if "ragged" in kind else 80


@pytest.mark.parametrize("kind, place", tiles(op.FORWARD_TILES))
def test_every_forward_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, op.FORWARD_TILES, kind, place)
    arguments, extra, expected_g, expected_u = forward_case(kept(kind), dtype, nf4)
    g, u, h = op.gated_forward(*arguments, **extra)
    close("g", expected_g, g)
    close("u", expected_u, u)
    # Of g and u as they were rounded.
    close("h", F.silu(g.double()) * u.double(), h)


@pytest.mark.parametrize("kind, place", tiles(GRADIENT_TILES))
def test_every_gradient_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, GRADIENT_TILES, kind, place)
    arguments, expected = gradient_case(kept(kind), dtype, nf4)
    out = torch.randn(TOKENS, WIDTH).to(dtype)
    exact = out.double()
    exact[arguments[4]] += expected
    assert gradient.gated_input_gradient(*arguments, out, accumulate=True) is out
    close("out", exact, out)


def test_one_side_with_a_low_rank_product() -> None:
    arguments, extra, _, _ = forward_case(17, torch.float32, False)
    alone = op.gated_forward(*arguments, up_low=extra["up_low"], up_b=extra["up_b"])
    plain, both = op.gated_forward(*arguments), op.gated_forward(*arguments, **extra)
    assert torch.equal(alone[0], plain[0])
    expected = both[1] - extra["up_bias"][arguments[4]]
    assert_close("u", expected, alone[1], atol=1e-5)


def test_no_lists_are_all_tokens_and_channels() -> None:
    x, gate, up = torch.randn(7, 20), torch.randn(11, 20), torch.randn(11, 20)
    for index in (None, torch.arange(11)):
        g, u, _ = op.gated_forward(x, None, gate, up, index)
        assert_close("g", x @ gate.t(), g)
        assert_close("u", x @ up.t(), u)
        out = gradient.gated_input_gradient(g, u, gate, up, None, index, torch.empty(7, 20))
        assert_close("out", g @ gate + u @ up, out, atol=1e-4)


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_equals_autograd(activation: str, dtype: torch.dtype) -> None:
    dh, g, u = (torch.randn(3, 700).mul(3).to(dtype) for _ in range(3))
    g.view(-1)[0] = 0.0
    gate, up = g.double().requires_grad_(), u.double().requires_grad_()
    (FORMULA[activation](gate) * up).backward(dh.double())
    dg, du = gradient.gated_backward(dh, g, u, activation)
    assert dg.dtype == du.dtype == dtype
    close("dg", gate.grad, dg)
    close("du", up.grad, du)


@activations
def test_backward_far_from_zero(activation: str) -> None:
    g = torch.tensor([-1e4, -90.0, -20.0, 20.0, 90.0, 1e4])
    gate = g.double().requires_grad_()
    FORMULA[activation](gate).sum().backward()
    one = torch.ones_like(g)
    dg, du = gradient.gated_backward(one, g, one, activation)
    close("dg", gate.grad, dg)
    close("du", FORMULA[activation](g.double()), du)


def test_nf4_is_decoded_bit_for_bit() -> None:
    """Products with the identity are the decoded matrices themselves."""
    index, zero = torch.tensor([0, 3, 4, 5]), torch.zeros(4, 4)
    (gate, gate_rows), (up, up_rows) = (matrix(6, 70, index, torch.float32, True) for _ in range(2))
    g, u, _ = op.gated_forward(torch.eye(70), None, gate, up, index)
    assert torch.equal(g.t(), gate_rows.float()) and torch.equal(u.t(), up_rows.float())
    for dg, du, rows in ((torch.eye(4), zero, gate_rows), (zero, torch.eye(4), up_rows)):
        out = gradient.gated_input_gradient(dg, du, gate, up, None, index, torch.empty(4, 70))
        assert torch.equal(out, rows.float())


@weights
def test_nothing_to_do(nf4: bool) -> None:
    none, rows = torch.empty(0, dtype=torch.int64), torch.tensor([1, 3])
    (gate, _), (up, _) = (matrix(6, 70, none, torch.float32, nf4) for _ in range(2))
    x, before = torch.randn(5, 70), torch.randn(5, 70)
    assert [part.shape for part in op.gated_forward(x, none, gate, up, none)] == [(0, 0)] * 3
    assert [part.shape for part in op.gated_forward(x, rows, gate, up, none)] == [(2, 0)] * 3
    empty = torch.empty(0, 4)
    assert [part.shape for part in gradient.gated_backward(empty, empty, empty)] == [(0, 4)] * 2
    for chosen, expected in ((none, before), (rows, before.index_fill(0, rows, 0.0))):
        grad = torch.empty(chosen.numel(), 0)
        assert torch.equal(gradient.gated_input_gradient(grad, grad, gate, up, chosen, none, before.clone()), expected)


@weights
def test_runs_are_bit_identical(nf4: bool) -> None:
    arguments, extra, _, _ = forward_case(17, torch.bfloat16, nf4)
    x, rows, gate, up, index = arguments
    runs = []
    for _ in range(2):
        g, u, h = op.gated_forward(*arguments, **extra)
        dg, du = gradient.gated_backward(h, g, u)
        runs.append(
            (g, u, h, dg, du, gradient.gated_input_gradient(dg, du, gate, up, rows, index, torch.zeros_like(x)))
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_refusals() -> None:
    x, weight = torch.randn(3, 70), torch.randn(5, 70)
    nf4, _ = matrix(5, 70, torch.arange(5), torch.float32, True)
    with pytest.raises(ValueError, match=r"'swish'.*silu"):
        op.gated_forward(x, None, weight, weight, None, activation="swish")
    with pytest.raises(ValueError, match="low and b"):
        op.gated_forward(x, None, weight, weight, None, up_b=torch.randn(5, 2))
    with pytest.raises(ValueError, match="both plain or both NF4"):
        op.gated_forward(x, None, weight, nf4, None)
    with pytest.raises(ValueError, match="gate is 5 x 70, up is 4 x 70"):
        op.gated_forward(x, None, weight, weight[:4], None)
