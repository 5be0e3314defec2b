"""Every tile of the indexed products, in Triton's interpreter, and what only the launchers take or refuse.

Sizes, dtypes and forms are those of the public operations: tests/kernels/test_indexed_linear.py.
"""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels.gpu import indexed_linear as op
from sparselora_kernels.gpu.tiling import Tile
from sparselora_kernels.operands import NNOperands, NTOperands
from support.compare import assert_close
from support.kernel_cases import some
from support.tile_cases import close, matrix, only, tiles, weights

TOKENS, CHOSEN, CHANNELS, WIDTH = 41, 33, 150, 70


def nt_case(k: int, dtype: torch.dtype, nf4: bool) -> tuple:
    """Tokens and lists of indexed_nt, its weight, its bias, and the exact result."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    weight, decoded = matrix(CHANNELS, WIDTH, index, dtype, nf4)
    x, bias = (torch.randn(TOKENS, WIDTH) / WIDTH**0.5).to(dtype), torch.randn(CHANNELS).to(dtype)
    return (x, rows, index), weight, bias, x[rows].double() @ decoded.t() + bias[index].double()


def nn_case(k: int, dtype: torch.dtype, nf4: bool) -> tuple:
    """Tokens and lists of indexed_nn, its weight, its additions, and the exact result."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    weight, decoded = matrix(CHANNELS, WIDTH, index, dtype, nf4)
    h = (torch.randn(CHOSEN, k) / k**0.5).to(dtype)
    # No multiple of the step of the sum over the rank.
    bias, low, b = (torch.randn(size).to(dtype) for size in ((WIDTH,), (CHOSEN, 19), (WIDTH, 19)))
    low = low / 19**0.5
    expected = h.double() @ decoded + bias.double() + low.double() @ b.double().t()
    return (h, rows, index), weight, {"bias": bias, "low": low, "b": b}, expected


def kept(kind: str) -> int:
    return 17 if "ragged" in kind else 144


@pytest.mark.parametrize("kind, place", tiles(op.NT_TILES))
def test_every_nt_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, op.NT_TILES, kind, place)
    (x, rows, index), weight, bias, expected = nt_case(kept(kind), dtype, nf4)
    close("y", expected, op.indexed_nt(NTOperands(x, rows, index, bias), weight))


@pytest.mark.parametrize("kind, place", tiles(op.NN_TILES))
def test_every_nn_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, op.NN_TILES, kind, place)
    (h, rows, index), weight, additions, expected = nn_case(kept(kind), dtype, nf4)
    out = torch.randn(TOKENS, WIDTH).to(dtype)
    exact = out.double()
    exact[rows] += expected
    operands = NNOperands(h, rows, index, out, accumulate=True, **additions)
    assert op.indexed_nn(operands, weight) is out
    close("out", exact, out)


def test_many_tiles_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than a group, and a last group that is not full."""
    monkeypatch.setitem(op.NT_TILES, "32", (Tile(16, 16, 16, 4, 2),))
    rows, index = some(180, 171), some(50, 35)
    x, weight = torch.randn(180, 20) / 20**0.5, torch.randn(50, 20)
    close("y", x[rows].double() @ weight[index].double().t(), op.indexed_nt(NTOperands(x, rows, index), weight))


@pytest.mark.parametrize("width", [64, 70, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_is_decoded_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    """A product with the identity is the decoded matrix itself."""
    index = torch.tensor([0, 3, 4])
    weight, decoded = matrix(6, width, index, dtype, True)
    decoded = decoded.to(dtype)
    assert torch.equal(op.indexed_nt(NTOperands(torch.eye(width, dtype=dtype), None, index), weight), decoded.t())
    out = torch.empty(3, width, dtype=dtype)
    assert torch.equal(op.indexed_nn(NNOperands(torch.eye(3, dtype=dtype), None, index, out), weight), decoded)


def test_no_lists_are_all_tokens_and_channels() -> None:
    x, weight, bias = torch.randn(7, 20), torch.randn(11, 20), torch.randn(11)
    for index in (None, torch.arange(11)):
        expected = x @ weight.t() + bias
        assert_close("nt", expected, op.indexed_nt(NTOperands(x, None, index, bias), weight))
        out = torch.empty(7, 20)
        assert_close("nn", x[:, :11] @ weight, op.indexed_nn(NNOperands(x[:, :11], None, index, out), weight))


@weights
def test_nothing_to_do(nf4: bool) -> None:
    none, rows = torch.empty(0, dtype=torch.int64), torch.tensor([1, 3])
    weight, _ = matrix(6, 70, none, torch.float32, nf4)
    x, h = torch.randn(5, 70), torch.randn(2, 6)
    assert op.indexed_nt(NTOperands(x, none, none), weight).shape == (0, 0)
    assert op.indexed_nt(NTOperands(x, rows, none), weight).shape == (2, 0)
    assert op.indexed_nt(NTOperands(x[:0], None, none), weight).shape == (0, 0)
    before = torch.randn(5, 70)
    assert torch.equal(op.indexed_nn(NNOperands(h[:0], none, none, before.clone()), weight), before)
    # No channels: the chosen rows are an empty sum, and the bias.
    bias = torch.randn(70)
    got = op.indexed_nn(NNOperands(h[:, :0], rows, none, before.clone(), bias=bias), weight)
    expected = before.clone()
    expected[rows] = bias
    assert torch.equal(got, expected)


@weights
def test_runs_are_bit_identical(nf4: bool) -> None:
    tokens, weight, bias, _ = nt_case(17, torch.bfloat16, nf4)
    nt = NTOperands(*tokens, bias)
    assert torch.equal(op.indexed_nt(nt, weight), op.indexed_nt(nt, weight))
    tokens, weight, additions, _ = nn_case(17, torch.bfloat16, nf4)
    outs = [torch.zeros(TOKENS, WIDTH).bfloat16() for _ in range(2)]
    runs = [op.indexed_nn(NNOperands(*tokens, out, **additions), weight) for out in outs]
    assert torch.equal(*runs)


def test_rows_that_lie_apart() -> None:
    """Views with a row stride of their own, and transposed ones, are read as they are."""
    x, weight, index = torch.randn(9, 40), torch.randn(11, 40), torch.tensor([2, 7])
    for name, left, right in (("strided", x[:, :20], weight[:, :20]), ("transposed", x[:, :9].t(), weight[:, :9])):
        assert_close(name, left @ right[index].t(), op.indexed_nt(NTOperands(left, None, index), right))


def test_refusals() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match="bfloat16"):
        op.indexed_nt(NTOperands(x, None, None), weight.bfloat16())
    with pytest.raises(ValueError, match="low and b"):
        op.indexed_nn(NNOperands(torch.randn(3, 5), None, None, x, low=torch.randn(3, 2)), weight)
    with pytest.raises(ValueError, match=r"b is torch\.float16"):
        low, b = torch.randn(3, 2), torch.randn(8, 2).half()
        op.indexed_nn(NNOperands(torch.randn(3, 5), None, None, x, low=low, b=b), weight)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"no indexed product in {dtype}"):
            op.indexed_nt(NTOperands(x.to(dtype), None, None), weight.to(dtype))
    with pytest.raises(ValueError, match="contiguous"):
        op.indexed_nn(NNOperands(torch.randn(3, 5), None, None, torch.empty(8, 3).t()), weight)
