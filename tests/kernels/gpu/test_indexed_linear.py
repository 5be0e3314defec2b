"""The indexed products, in Triton's interpreter, equal the plain formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparselora_kernels import nf4_rows
from sparselora_kernels.gpu import indexed_linear as op
from sparselora_kernels.gpu.indexed_linear import NF4Matrix, Tile
from sparselora_kernels.reference.nf4 import LEVELS
from support.compare import assert_close

# (tokens, chosen or None, channels, chosen or None, width): odd sizes, one of everything, all, one channel.
SHAPES = [(9, 5, 21, 4, 70), (1, 1, 1, 1, 1), (20, 17, 33, None, 65), (12, None, 40, 16, 130), (5, 3, 7, 1, 64)]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
weights = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# One rounding of the exact result, and the error of fp32 sums of about one.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2**-8, 1e-5), torch.float16: (2**-11, 1e-5)}


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


def nt_case(shape: tuple, dtype: torch.dtype, nf4: bool) -> tuple:
    """Arguments of indexed_nt, its bias, and the exact result."""
    tokens, n, channels, k, width = shape
    rows, index = choice(tokens, n), choice(channels, k)
    weight, decoded = matrix(channels, width, index, dtype, nf4)
    x, bias = (torch.randn(tokens, width) / width**0.5).to(dtype), torch.randn(channels).to(dtype)
    product = x[every(tokens, rows)].double() @ decoded.t()
    return (x, weight, rows, index), bias, product, product + bias[every(channels, index)].double()


def nn_case(shape: tuple, dtype: torch.dtype, nf4: bool, indexed: bool) -> tuple:
    """Arguments of indexed_nn but for ``out``, those of its additions, and the exact results without and with them."""
    tokens, n, channels, k, width = shape
    rows, index = choice(tokens, n), choice(channels, k)
    weight, decoded = matrix(channels, width, index, dtype, nf4)
    here, kept = every(tokens, rows), every(channels, index)
    h = (torch.randn(tokens, channels) / kept.numel() ** 0.5).to(dtype)
    taken = h[here][:, kept]
    bias, low, b = (torch.randn(size).to(dtype) for size in ((width,), (here.numel(), 19), (width, 19)))
    low = low / 19**0.5
    product = taken.double() @ decoded
    added = product + bias.double() + low.double() @ b.double().t()
    return (h if indexed else taken, weight, rows, index), {"bias": bias, "low": low, "b": b}, product, added


@cases
@weights
@dtypes
def test_nt_equals_formula(shape: tuple, nf4: bool, dtype: torch.dtype) -> None:
    arguments, bias, product, biased = nt_case(shape, dtype, nf4)
    close("without bias", product, op.indexed_nt(*arguments))
    got = op.indexed_nt(*arguments, bias=bias)
    assert got.dtype == dtype
    close("with bias", biased, got)


@cases
@weights
@dtypes
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
def test_nt_writes_only_its_places(shape: tuple, nf4: bool, dtype: torch.dtype, accumulate: bool) -> None:
    arguments, bias, _, expected = nt_case(shape, dtype, nf4)
    tokens, _, channels, _, _ = shape
    before = torch.randn(tokens, channels).to(dtype)
    place = every(tokens, arguments[2])[:, None], every(channels, arguments[3])
    exact = before.double()
    exact[place] = expected + (exact[place] if accumulate else 0)
    out = before.clone()
    assert op.indexed_nt(*arguments, bias=bias, out=out, accumulate=accumulate) is out
    close("out", exact, out)
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[place] = False
    assert torch.equal(out[untouched], before[untouched])


@cases
@weights
@dtypes
@pytest.mark.parametrize("indexed", [False, True], ids=["compact", "indexed"])
def test_nn_equals_formula(shape: tuple, nf4: bool, dtype: torch.dtype, indexed: bool) -> None:
    arguments, additions, product, added = nn_case(shape, dtype, nf4, indexed)
    before = torch.randn(shape[0], shape[4]).to(dtype)
    here = every(shape[0], arguments[2])
    untouched = torch.ones(shape[0], dtype=torch.bool)
    untouched[here] = False
    for name, extra, expected in (("plain", {}, product), ("bias and low rank", additions, added)):
        for accumulate in (False, True):
            out, exact = before.clone(), before.double()
            exact[here] = expected + (exact[here] if accumulate else 0)
            assert op.indexed_nn(*arguments, out, indexed=indexed, accumulate=accumulate, **extra) is out
            close(f"{name}, accumulate={accumulate}", exact, out)
            assert torch.equal(out[untouched], before[untouched])


def tiles(tables: dict) -> list:
    return [
        pytest.param(kind, place, id=f"{kind} {tile.m}x{tile.n}x{tile.k}")
        for kind, table in tables.items()
        for place, tile in enumerate(table)
    ]


def forced(monkeypatch: pytest.MonkeyPatch, tables: dict, kind: str, place: int) -> tuple:
    """Arguments of a case that launches this tile and no other."""
    tile = tables[kind][place]
    for name in tables:
        monkeypatch.setitem(tables, name, (tile,) if name == kind else ())
    dtype = torch.bfloat16 if kind.startswith("16") else torch.float32
    return (41, 33, 150, 17 if "ragged" in kind else 144, 70), dtype, "nf4" in kind


@pytest.mark.parametrize("kind, place", tiles(op.NT_TILES))
def test_every_nt_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    shape, dtype, nf4 = forced(monkeypatch, op.NT_TILES, kind, place)
    arguments, bias, _, expected = nt_case(shape, dtype, nf4)
    if "columns" not in kind:
        close("y", expected, op.indexed_nt(*arguments, bias=bias))
        return
    out = torch.zeros(41, 150, dtype=dtype)
    op.indexed_nt(*arguments, bias=bias, out=out)
    close("out", expected, out[arguments[2]][:, arguments[3]])


@pytest.mark.parametrize("kind, place", tiles(op.NN_TILES))
def test_every_nn_tile(monkeypatch: pytest.MonkeyPatch, kind: str, place: int) -> None:
    shape, dtype, nf4 = forced(monkeypatch, op.NN_TILES, kind, place)
    columns = "columns" in kind
    arguments, additions, _, expected = nn_case(shape, dtype, nf4, columns)
    out = torch.zeros(41, 70, dtype=dtype)
    op.indexed_nn(*arguments, out, indexed=columns, **additions)
    close("out", expected, out[arguments[2]])


def test_many_tiles_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than a group, and a last group that is not full."""
    monkeypatch.setitem(op.NT_TILES, "32", (Tile(16, 16, 16, 4, 2),))
    arguments, bias, _, expected = nt_case((180, 171, 50, 35, 20), torch.float32, False)
    close("y", expected, op.indexed_nt(*arguments, bias=bias))


def test_half_precision() -> None:
    arguments, bias, _, expected = nt_case(SHAPES[0], torch.float16, True)
    close("nt", expected, op.indexed_nt(*arguments, bias=bias))
    arguments, additions, _, expected = nn_case(SHAPES[0], torch.float16, True, False)
    out = torch.zeros(9, 70, dtype=torch.float16)
    close("nn", expected, op.indexed_nn(*arguments, out, indexed=False, **additions)[arguments[2]])


@pytest.mark.parametrize("width", [64, 70, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_is_decoded_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    """A product with the identity is the decoded matrix itself."""
    index = torch.tensor([0, 3, 4])
    weight, decoded = matrix(6, width, index, dtype, True)
    decoded = decoded.to(dtype)
    assert torch.equal(op.indexed_nt(torch.eye(width, dtype=dtype), weight, None, index), decoded.t())
    out = torch.empty(3, width, dtype=dtype)
    assert torch.equal(op.indexed_nn(torch.eye(3, dtype=dtype), weight, None, index, out, indexed=False), decoded)
    assert torch.equal(op.copied_rows(weight, index, dtype), decoded)


def test_all_channels_equal_the_dense_product() -> None:
    x, weight = torch.randn(7, 20), torch.randn(11, 20)
    for index in (None, torch.arange(11)):
        assert_close("nt", x @ weight.t(), op.indexed_nt(x, weight, None, index))
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
@dtypes
def test_runs_are_bit_identical(nf4: bool, dtype: torch.dtype) -> None:
    nt, bias, _, _ = nt_case(SHAPES[2], dtype, nf4)
    first = op.indexed_nt(*nt, bias=bias)
    assert torch.equal(first, op.indexed_nt(*nt, bias=bias))
    nn, additions, _, _ = nn_case(SHAPES[0], dtype, nf4, True)
    runs = [op.indexed_nn(*nn, torch.zeros(9, 70, dtype=dtype), indexed=True, **additions) for _ in range(2)]
    assert torch.equal(*runs)


def test_rows_that_lie_apart() -> None:
    """Views with a row stride of their own, and transposed ones, are read as they are."""
    x, weight, index = torch.randn(9, 40), torch.randn(11, 40), torch.tensor([2, 7])
    assert_close("strided", x[:, :20] @ weight[index, :20].t(), op.indexed_nt(x[:, :20], weight[:, :20], None, index))
    assert_close(
        "transposed", x[:, :9].t() @ weight[index, :9].t(), op.indexed_nt(x[:, :9].t(), weight[:, :9], None, index)
    )


@cases
@weights
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
def test_vendor_forms_equal_the_kernels(shape: tuple, nf4: bool, accumulate: bool) -> None:
    arguments, bias, _, _ = nt_case(shape, torch.float32, nf4)
    assert_close("nt", op.indexed_nt(*arguments, bias=bias), op.vendor_nt(*arguments, bias=bias))
    before = torch.randn(shape[0], shape[2])
    outs = [
        form(*arguments, bias=bias, out=before.clone(), accumulate=accumulate) for form in (op.indexed_nt, op.vendor_nt)
    ]
    assert_close("nt out", *outs)
    for indexed in (False, True):
        arguments, additions, _, _ = nn_case(shape, torch.float32, nf4, indexed)
        before = torch.randn(shape[0], shape[4])
        outs = [
            form(*arguments, before.clone(), indexed=indexed, accumulate=accumulate, **additions)
            for form in (op.indexed_nn, op.vendor_nn)
        ]
        assert_close("nn", *outs)


def test_the_vendor_is_preferred_for_many_channels_only() -> None:
    for length in (4096, 14336):
        assert not op.prefers_vendor(8192, 143, length, torch.bfloat16)
        assert op.prefers_vendor(8192, 3584, length, torch.bfloat16)
    # Decoding again in every tile makes the copy pay earlier.
    assert op.prefers_vendor(8192, 512, 14336, torch.bfloat16, nf4=True)
    assert not op.prefers_vendor(8192, 512, 14336, torch.bfloat16)


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
    with pytest.raises(ValueError, match="float64"):
        op.indexed_nt(x.double(), weight.double(), None, None)
    with pytest.raises(ValueError, match="contiguous"):
        op.indexed_nt(x, weight, None, None, out=torch.empty(5, 3).t())
