"""Every tile of the indexed products, in Triton's interpreter, and what only the launchers take or refuse.

Sizes, dtypes and forms are those of the public operations: tests/kernels/test_indexed_linear.py.
"""

from __future__ import annotations

import pytest
import torch

from sparselora_kernels.gpu import indexed_linear as op
from sparselora_kernels.gpu.tiling import Tile
from support.compare import assert_close
from support.kernel_cases import some
from support.tile_cases import close, matrix, only, tiles, weights

TOKENS, CHOSEN, CHANNELS, WIDTH = 41, 33, 150, 70


def nt_case(k: int, dtype: torch.dtype, nf4: bool) -> tuple:
    """Arguments of indexed_nt, its bias, and the exact result."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    weight, decoded = matrix(CHANNELS, WIDTH, index, dtype, nf4)
    x, bias = (torch.randn(TOKENS, WIDTH) / WIDTH**0.5).to(dtype), torch.randn(CHANNELS).to(dtype)
    return (x, weight, rows, index), bias, x[rows].double() @ decoded.t() + bias[index].double()


def nn_case(k: int, dtype: torch.dtype, nf4: bool, indexed: bool) -> tuple:
    """Arguments of indexed_nn but for ``out``, its additions, and the exact result."""
    rows, index = some(TOKENS, CHOSEN), some(CHANNELS, k)
    weight, decoded = matrix(CHANNELS, WIDTH, index, dtype, nf4)
    h = (torch.randn(TOKENS, CHANNELS) / k**0.5).to(dtype)
    taken = h[rows][:, index]
    # No multiple of the step of the sum over the rank.
    bias, low, b = (torch.randn(size).to(dtype) for size in ((WIDTH,), (CHOSEN, 19), (WIDTH, 19)))
    low = low / 19**0.5
    expected = taken.double() @ decoded + bias.double() + low.double() @ b.double().t()
    return (h if indexed else taken, weight, rows, index), {"bias": bias, "low": low, "b": b}, expected


def kept(kind: str) -> int:
    return 17 if "ragged" in kind else 144


@pytest.mark.parametrize("kind, place", tiles(op.NT_TILES))
def test_every_nt_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, op.NT_TILES, kind, place)
    arguments, bias, expected = nt_case(kept(kind), dtype, nf4)
    if "columns" not in kind:
        close("y", expected, op.indexed_nt(*arguments, bias=bias))
        return
    out = torch.randn(TOKENS, CHANNELS).to(dtype)
    exact, at = out.double(), (arguments[2][:, None], arguments[3])
    exact[at] += expected
    assert op.indexed_nt(*arguments, bias=bias, out=out, accumulate=True) is out
    close("out", exact, out)


@pytest.mark.parametrize("kind, place", tiles(op.NN_TILES))
def test_every_nn_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    dtype, nf4 = only(monkeypatch, op.NN_TILES, kind, place)
    columns = "columns" in kind
    arguments, additions, expected = nn_case(kept(kind), dtype, nf4, columns)
    out = torch.randn(TOKENS, WIDTH).to(dtype)
    exact = out.double()
    exact[arguments[2]] += expected
    assert op.indexed_nn(*arguments, out, indexed=columns, accumulate=True, **additions) is out
    close("out", exact, out)


def test_many_tiles_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than a group, and a last group that is not full."""
    monkeypatch.setitem(op.NT_TILES, "32", (Tile(16, 16, 16, 4, 2),))
    rows, index = some(180, 171), some(50, 35)
    x, weight = torch.randn(180, 20) / 20**0.5, torch.randn(50, 20)
    close("y", x[rows].double() @ weight[index].double().t(), op.indexed_nt(x, weight, rows, index))


@pytest.mark.parametrize("width", [64, 70, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_is_decoded_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    """A product with the identity is the decoded matrix itself."""
    index = torch.tensor([0, 3, 4])
    weight, decoded = matrix(6, width, index, dtype, True)
    decoded = decoded.to(dtype)
    assert torch.equal(op.indexed_nt(torch.eye(width, dtype=dtype), weight, None, index), decoded.t())
    out = torch.empty(3, width, dtype=dtype)
    assert torch.equal(op.indexed_nn(torch.eye(3, dtype=dtype), weight, None, index, out, indexed=False), decoded)


def test_no_lists_are_all_tokens_and_channels() -> None:
    x, weight, bias = torch.randn(7, 20), torch.randn(11, 20), torch.randn(11)
    for index in (None, torch.arange(11)):
        expected = x @ weight.t() + bias
        assert_close("nt", expected, op.indexed_nt(x, weight, None, index, bias=bias))
        out = op.indexed_nt(x, weight, None, index, bias=bias, out=torch.ones(7, 11), accumulate=True)
        assert_close("nt, added", expected + 1, out)
        out = torch.empty(7, 20)
        assert_close("nn", x[:, :11] @ weight, op.indexed_nn(x[:, :11], weight, None, index, out, indexed=True))


@weights
def test_nothing_to_do(nf4: bool) -> None:
    none, rows = torch.empty(0, dtype=torch.int64), torch.tensor([1, 3])
    weight, _ = matrix(6, 70, none, torch.float32, nf4)
    x, out = torch.randn(5, 70), torch.randn(5, 6)
    assert op.indexed_nt(x, weight, none, none).shape == (0, 0)
    assert op.indexed_nt(x, weight, rows, none).shape == (2, 0)
    assert op.indexed_nt(x[:0], weight, None, none).shape == (0, 0)
    assert torch.equal(op.indexed_nt(x, weight, rows, none, out=out.clone()), out)
    before = torch.randn(5, 70)
    assert torch.equal(op.indexed_nn(out[:0], weight, none, none, before.clone(), indexed=False), before)
    # No channels: the chosen rows are an empty sum, and the bias.
    bias = torch.randn(70)
    got = op.indexed_nn(out[:2, :0], weight, rows, none, before.clone(), indexed=False, bias=bias)
    expected = before.clone()
    expected[rows] = bias
    assert torch.equal(got, expected)


@weights
def test_runs_are_bit_identical(nf4: bool) -> None:
    nt, bias, _ = nt_case(17, torch.bfloat16, nf4)
    assert torch.equal(op.indexed_nt(*nt, bias=bias), op.indexed_nt(*nt, bias=bias))
    nn, additions, _ = nn_case(17, torch.bfloat16, nf4, True)
    runs = [op.indexed_nn(*nn, torch.zeros(TOKENS, WIDTH).bfloat16(), indexed=True, **additions) for _ in range(2)]
    assert torch.equal(*runs)


def test_rows_that_lie_apart() -> None:
    """Views with a row stride of their own, and transposed ones, are read as they are."""
    x, weight, index = torch.randn(9, 40), torch.randn(11, 40), torch.tensor([2, 7])
    assert_close("strided", x[:, :20] @ weight[index, :20].t(), op.indexed_nt(x[:, :20], weight[:, :20], None, index))
    assert_close(
        "transposed", x[:, :9].t() @ weight[index, :9].t(), op.indexed_nt(x[:, :9].t(), weight[:, :9], None, index)
    )


def test_refusals() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match="bfloat16"):
        op.indexed_nt(x, weight.bfloat16(), None, None)
    with pytest.raises(ValueError, match="out"):
        op.indexed_nt(x, weight, None, None, accumulate=True)
    with pytest.raises(ValueError, match="low and b"):
        op.indexed_nn(torch.randn(3, 5), weight, None, None, x, indexed=False, low=torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"b is torch\.float16"):
        low, b = torch.randn(3, 2), torch.randn(8, 2).half()
        op.indexed_nn(torch.randn(3, 5), weight, None, None, x, indexed=False, low=low, b=b)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"no indexed product in {dtype}"):
            op.indexed_nt(x.to(dtype), weight.to(dtype), None, None)
    with pytest.raises(ValueError, match="contiguous"):
        op.indexed_nt(x, weight, None, None, out=torch.empty(5, 3).t())
