"""Which form of a product is taken, and which tile: by rates of a kind, bytes, copies and launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import gated_ffn, indexed_linear, rates
from sparselora_kernels.choice import prefers_vendor
from sparselora_kernels.gpu.estimate import product_seconds
from sparselora_kernels.gpu.gated_ffn import FORWARD_TILES
from sparselora_kernels.gpu.gated_gradient import GRADIENT_TILES
from sparselora_kernels.gpu.indexed_linear import NN_TILES, NT_TILES
from sparselora_kernels.gpu.tiling import choose
from sparselora_kernels.operands import NNOperands, NTOperands
from support.kernel_cases import ffn_lists, running, some

CPU, BF16 = torch.device("cpu"), torch.bfloat16
products = pytest.mark.parametrize("product", rates.PRODUCTS)


@products
@pytest.mark.parametrize("length", [4096, 8192])
def test_the_vendor_is_preferred_for_many_channels_only(product: str, length: int) -> None:
    """At the kept neurons of an FFN at 0.99, never; at a quarter of a wide matrix, always."""
    assert not prefers_vendor(product, 6144, 144, length, BF16)
    assert prefers_vendor(product, 6144, 3584, length, BF16)
    # Decoding again in every tile makes the copy pay earlier.
    assert prefers_vendor(product, 6144, 512, length, BF16, nf4=True)
    assert not prefers_vendor(product, 6144, 512, length, BF16)


@products
def test_every_copy_and_launch_counts(product: str) -> None:
    """Between few and many channels one number is the border: what is copied moves it up, what is not moves it down."""

    def border(**options: object) -> int:
        return next(k for k in range(16, 16384, 16) if prefers_vendor(product, 6144, k, 4096, BF16, **options))  # type: ignore[arg-type]

    def faster(name: str, times: float) -> dict[str, float]:
        return {**rates.DEFAULTS, name: rates.DEFAULTS[name] * times}

    plain = border()
    assert border(copies_rows=False) < plain < border(updates=True)
    assert border(rates=faster("copy", 2)) < plain < border(rates=faster("launch", 4))
    assert border(rates=faster("vendor 16", 1.3)) < plain < border(rates=faster(f"{product} 16", 1.1))
    others = (name for name in rates.DEFAULTS if name not in ("vendor 16", f"{product} 16", "copy", "launch", "memory"))
    assert all(border(rates=faster(name, 1.3)) == plain for name in others)


def test_the_gated_product_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and input gradient of gate and up take the vendor's form where the rule says so, with equal results."""
    lists = ffn_lists((2, 40, 1, 20, 50, 30))
    gate, up = torch.randn(50, 20), torch.randn(50, 20)
    asked: list[str] = []

    def run(vendor: bool) -> tuple[Tensor, ...]:
        def answer(product: str, *_: object, **__: object) -> bool:
            asked.append(product)
            return vendor

        monkeypatch.setattr(indexed_linear, "takes_vendor", answer)
        torch.manual_seed(1)
        x = torch.randn(43, 20, requires_grad=True)
        with running("triton"):
            hidden = kernels.gated_up(x, gate, up, **lists)
            (hidden[0].sum() + hidden[1].sum()).backward()
        assert x.grad is not None
        return *hidden, x.grad

    calls: list[int] = []
    vendor_nt = gated_ffn.vendor_nt
    monkeypatch.setattr(gated_ffn, "vendor_nt", lambda *args: calls.append(1) or vendor_nt(*args))
    for own, theirs in zip(run(False), run(True)):
        torch.testing.assert_close(own, theirs)
    assert asked == ["gated", "gradient"] * 2 and len(calls) == 2


def test_products_say_what_they_copy_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(indexed_linear, "takes_vendor", lambda *a, **options: not asked.append((*a[:-1], options)))
    weight = kernels.EncodedWeight((torch.randn(9, 6),))
    rows, channels, h, out = some(8, 5), some(9, 4), torch.randn(5, 4), torch.zeros(8, 6)
    with running("triton"):
        indexed_linear.indexed_nt(NTOperands(torch.randn(8, 6), rows, channels), weight)
        indexed_linear.indexed_nt(NTOperands(torch.randn(8, 6), None, None), weight)
        indexed_linear.indexed_nn(NNOperands(h, rows, channels, out, low=h[:, :2], b=torch.randn(6, 2)), weight)
    fp32 = torch.float32
    assert asked == [
        ("nt", 5, 4, 6, fp32, {"copies_rows": True, "nf4": False}),
        ("nt", 8, 9, 6, fp32, {"copies_rows": False, "nf4": False}),
        ("nn", 5, 4, 6, fp32, {"updates": True, "nf4": False}),
    ]


@pytest.mark.parametrize(
    ("product", "n", "k", "length", "nf4", "vendor"),
    [
        # Few programs, each with a long sum: as measured on an H200, 74 µs against 22, 39 against 22.
        ("nt", 512, 144, 8192, True, True),
        ("nt", 512, 144, 8192, False, True),
        # The same in the other direction has programs enough and a short sum: 17 against 27.
        ("nn", 512, 144, 8192, True, False),
        ("nn", 512, 144, 8192, False, False),
        # Gate and up in NF4, decoded in every tile of tokens: 131 against 88.
        ("gated", 6144, 144, 4096, True, True),
        ("gated", 6144, 144, 4096, False, False),
        ("gradient", 6144, 144, 4096, False, False),
    ],
)
def test_whole_tiles_count(product: str, n: int, k: int, length: int, nf4: bool, vendor: bool) -> None:
    assert indexed_linear.takes_vendor(product, n, k, length, BF16, CPU, nf4=nf4) == vendor


def test_a_part_of_a_tile_takes_as_long_as_all_of_it() -> None:
    seconds = [product_seconds("nt", 512, k, 4096, BF16, nf4=False, device=CPU) for k in (16, 64, 4096)]
    assert seconds[0] == seconds[1] < seconds[2] / 3


def test_tiles_are_chosen_by_traffic_too() -> None:
    """Gate and up of 6144 tokens at 144 channels: 288 programs of 64 x 64 would compute as fast and read 1.5 times as
    much. Few tokens still take the small tile, whose programs fill the device."""
    tile = choose(FORWARD_TILES, "16", "gated", 6144, 144, CPU)
    assert (tile.m, tile.n) == (128, 64)
    tile = choose(FORWARD_TILES, "16", "gated", 512, 144, CPU)
    assert (tile.m, tile.n) == (64, 64)
    tables = (("nt", NT_TILES), ("nn", NN_TILES), ("gated", FORWARD_TILES), ("gradient", GRADIENT_TILES))
    for product, table in tables:
        for kind, tiles in table.items():
            assert choose(table, kind, product, 65536, 65536, CPU) == tiles[0], "the first is for large products"


def test_a_measured_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rates" / "h200.json"
    rates.write(file, "NVIDIA H200", {"nt 16": 5e14})
    assert rates.read(file) == {**rates.DEFAULTS, "nt 16": 5e14}
    monkeypatch.setenv(rates.VARIABLE, str(file))
    rates.rates_of.cache_clear()
    try:
        assert rates.rates_of(CPU)["nt 16"] == 5e14
        monkeypatch.delenv(rates.VARIABLE)
        assert rates.path_of("NVIDIA H200 NVL").name == "nvidia-h200-nvl.json"
    finally:
        rates.rates_of.cache_clear()
    assert rates.rates_of(CPU) is rates.DEFAULTS


@pytest.mark.parametrize("text, reason", [
    ("{", "no rates"),
    ("{}", "no rates"),
    (json.dumps({"rates": {"nt 64": 1.0}}), "nt 64: unknown"),
    (json.dumps({"rates": {"nt 16": 0}}), "nt 16"),
    (json.dumps({"rates": {"nt 16": "fast"}}), "no rates"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused_by_name(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(rates.RatesError, match=reason) as refused:
        rates.read(file)
    assert str(file) in str(refused.value)
