"""The checks of benchmarks/gpu_kernels.py: every Triton kernel on inputs of several sizes, and what is right.

The formulas are written out in fp64 on the same inputs. Sizes are odd on purpose, and large enough that every tile of a
launcher's table is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparselora_kernels import EncodedWeight, float_layout, floats
from sparselora_kernels.activations import ACTIVATIONS, activate, activate_backward
from sparselora_kernels.gpu import columns, fp8, gated_ffn, gated_gradient, indexed_linear, nf4, score, select
from sparselora_kernels.gpu.matrix import NF4Matrix
from sparselora_kernels.indexed_linear import product_nn, product_nt, vendor_nn, vendor_nt
from sparselora_kernels.nf4 import BLOCK, blocks, nested_scales, nested_slots
from sparselora_kernels.operands import NNOperands, NTOperands
from sparselora_kernels.reference import gated_ffn_score, projection_score, select_channels
from sparselora_kernels.reference.nf4 import LEVELS

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Of the largest value. Some bf16 results are made of rounded ones; fp32 sums of thousands of products differ by their
order."""


@dataclass(frozen=True, slots=True)
class Size:
    """T tokens of which n are read, H and C the sides of a matrix, k its chosen rows, R the rank of an adapter."""

    T: int
    H: int
    C: int
    n: int
    k: int
    R: int

    def __str__(self) -> str:
        return f"T {self.T} H {self.H} C {self.C} n {self.n} k {self.k} R {self.R}"


SIZES = (
    Size(T=261, H=200, C=333, n=129, k=37, R=5),
    Size(T=70, H=64, C=16, n=1, k=1, R=1),
    Size(T=600, H=1024, C=768, n=600, k=768, R=16),
    Size(T=2048, H=4096, C=14336, n=1536, k=144, R=32),
    Size(T=4096, H=4096, C=4096, n=3001, k=1024, R=32),
)
FLOATS = (
    (8, 0, 0, 1), (8, 0, 1, 0), (8, 0, 128, 128), (8, 2, 32, 1), (4, 1, 16, 1), (4, 1, 1, 16),
    (4, 3, 16, 1), (4, 3, 1, 16), (4, 2, 32, 1), (4, 2, 1, 32),
)  # fmt: skip
"""Bits, kind of scale, block, every, as checkpoints have them."""
TINY_SIZES = (Size(T=37, H=72, C=21, n=19, k=7, R=3), Size(T=9, H=64, C=16, n=1, k=1, R=1))


@dataclass(frozen=True, slots=True)
class Check:
    """One call: ``run`` gives what the kernel computed and what is right, pair by pair."""

    name: str
    dtype: str
    run: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    tolerance: float
    """Of the largest right value; 0 asks for equality."""


def all_checks(device: torch.device, sizes: Iterable[Size]) -> Iterator[Check]:
    for dtype, size in product(TOLERANCE, sizes):
        data = Data(size, device, dtype)
        yield from _score_checks(data)
        yield from _nf4_checks(data)
        yield from _float_checks(data)
        for kind in ("plain", "nf4"):
            yield from _indexed_checks(data, kind)
            yield from _gated_checks(data, kind)
    yield from _select_checks(device, sizes)


# --- inputs -----------------------------------------------------------------------------------------------------------


class Data:
    """Random inputs of one size and dtype."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self.rows, self.channels = self.pick(size.T, size.n), self.pick(size.C, size.k)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device, generator=self.generator) * scale).to(self.dtype)

    def pick(self, total: int, count: int) -> Tensor:
        """``count`` sorted indices."""
        order = torch.randperm(total, device=self.device, generator=self.generator)
        return order[:count].sort().values

    def weight(self, channels: int, length: int, kind: str) -> tuple[Any, Any, Tensor]:
        """As the kernels take it for the chosen channels, for all of them, and its values (C, length) in the dtype."""
        if kind == "plain":
            plain = self.normal(channels, length, scale=length**-0.5)
            return plain, plain, plain
        codes = self.bytes(channels, blocks(length) * BLOCK // 2)
        absmax = torch.rand(channels, blocks(length), device=self.device, generator=self.generator) * 2 * length**-0.5
        levels = torch.tensor(LEVELS, device=self.device)
        values = _decode(codes, absmax, levels, length).to(self.dtype)
        chosen = NF4Matrix(codes, absmax[self.channels].contiguous(), levels, length)
        return chosen, NF4Matrix(codes, absmax, levels, length), values

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=self.device, generator=self.generator, dtype=torch.uint8)

    def check(self, name: str, run: Callable[[], Iterable[tuple[Tensor, Tensor]]], tolerance: float = 1.0) -> Check:
        """``tolerance`` as a multiple of the dtype's."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Check(f"{name}, {dtype}, {self.size}", dtype, run, tolerance * TOLERANCE[self.dtype])


def _decode(codes: Tensor, absmax: Tensor, levels: Tensor, length: int) -> Tensor:
    """Values (k, length) fp32: the first of a byte's two in its high half, 64 of them to an absmax."""
    indices = torch.stack([codes >> 4, codes & 15], -1).flatten(1).int()
    values = levels[indices].view(codes.shape[0], -1, BLOCK) * absmax[:, :, None]
    return values.flatten(1)[:, :length]


# --- checks -----------------------------------------------------------------------------------------------------------


def _score_checks(data: Data) -> Iterator[Check]:
    size = data.size
    x = data.normal(size.T, size.H)
    factors = [(data.normal(8, size.H, scale=size.H**-0.5), data.normal(out, 8)) for out in (size.C, size.C, size.k)]
    for name in ACTIVATIONS:

        def gated(name: str = name) -> Iterator[tuple[Tensor, Tensor]]:
            want = gated_ffn_score(x, data.rows, *factors[:2], lambda h: activate(name, h))
            yield score.gated_ffn_score(x, data.rows, *factors[:2], name), want

        # Squares of a product of two estimates from rounded low products: four roundings to the dtype.
        yield data.check(f"score.gated_ffn_score, {name}", gated, tolerance=4)

    def projections() -> Iterator[tuple[Tensor, Tensor]]:
        got = score.projection_scores(x, data.rows, *zip(*factors))
        yield got, torch.cat([projection_score(x, data.rows, a, b) for a, b in factors])

    yield data.check("score.projection_scores", projections, tolerance=4)


def _select_checks(device: torch.device, sizes: Iterable[Size]) -> Iterator[Check]:
    counts = sorted({size.C for size in sizes} | ({select.LARGEST} if max(s.C for s in sizes) > 1000 else set()))
    for n in counts:
        for keep in sorted({1, n // 3 + 1, n}):
            scores = torch.rand(n, device=device, generator=torch.Generator(device).manual_seed(n))
            ties = (scores * 8).floor()
            holes = scores.masked_fill(scores < 0.5, math.nan)
            for kind, values in (("random", scores), ("ties", ties), ("NaN", holes)):

                def run(values: Tensor = values, keep: int = keep) -> Iterator[tuple[Tensor, Tensor]]:
                    known = values.masked_fill(values.isnan(), -math.inf)
                    yield select.select_channels(values, keep), select_channels(known, keep)

                yield Check(f"select.select_channels, {kind}, n {n} k {keep}", "float32", run, 0.0)


def _nf4_checks(data: Data) -> Iterator[Check]:
    """Bit for bit, rows that are decoded alone included; two lengths, one of them no multiple of 64."""
    levels = torch.tensor(LEVELS, device=data.device)
    table = torch.linspace(-1, 1, 256, device=data.device)
    lengths = (data.size.H, data.size.H + 9)[data.device.type != "cuda" :]
    for length, double, chosen in product(lengths, (True, False), (True, False)):
        codes, count = data.bytes(data.size.C, blocks(length) * BLOCK // 2), blocks(length)
        numbers = data.channels if chosen else torch.arange(data.size.C, device=data.device)
        if double:
            small = data.bytes(data.size.C, count)
            nested = torch.rand(data.size.C, nested_scales(count), device=data.device, generator=data.generator)
            offset = torch.full((data.size.C, 1), 0.04, device=data.device)
            scales = torch.cat([small, nested.view(torch.uint8), offset.view(torch.uint8)], 1)
            absmax = table[small[numbers].int()] * nested[numbers].gather(1, nested_slots(numbers, count)) + 0.04
        else:
            absmax = torch.rand(data.size.C, count, device=data.device, generator=data.generator)
            scales, absmax = absmax.view(torch.uint8), absmax[numbers]

        def run(
            args: Any = (codes, scales, data.channels if chosen else None, levels, table),
            options: Any = {"length": length, "double_quant": double, "first": 0},  # noqa: B006
            want: Any = (codes[numbers], absmax, levels, length),
        ) -> Iterator[tuple[Tensor, Tensor]]:
            yield nf4.nf4_rows(*args, data.dtype, **options), _decode(*want).to(data.dtype)

        what = f"{'double' if double else 'single'}, {'chosen' if chosen else 'all'} rows of {length}"
        yield data.check(f"nf4.nf4_rows, {what}", run, tolerance=0)


def _float_checks(data: Data) -> Iterator[Check]:
    """fp8 and fp4 decoded, and a row rounded to fp8, bit for bit; products in fp8 where the device has them."""
    size = data.size
    x, h = data.normal(size.n, size.H), data.normal(size.n, size.k)
    for bits, scale, block, every in FLOATS[:: 1 if data.device.type == "cuda" else 3]:
        codes = data.bytes(size.C, floats.row_bytes(size.H, bits))
        if bits == 8:
            codes = codes.masked_fill(codes & 127 == 127, 5)  # No NaN.
        count = -(-size.C // every) if every else 1, floats.blocks(size.H, block)
        scales = torch.rand(count, device=data.device, generator=data.generator) + 0.5
        number = torch.full((1, 1), 0.37, device=data.device)
        whole = number.view(torch.uint8) if scale in (floats.E4M3, floats.E4M3_OVER) else None
        stored = scales.view(torch.uint8) if scale == floats.FP32 else data.bytes(*count) % 60 + 60
        factors = scales if scale == floats.FP32 else floats.scale_values(scale, data.device)[stored.int()]
        if whole is not None:
            factors = factors / number if scale == floats.E4M3_OVER else factors * number
        pairs = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, : size.H]
        rows = torch.arange(size.C, device=data.device) // (every or size.C)
        columns_of = torch.arange(size.H, device=data.device) // (block or size.H)
        values = floats.code_values(bits, data.device)[pairs.int()] * factors[rows][:, columns_of]
        weight = EncodedWeight(
            (codes, stored) if whole is None else (codes, stored, whole),
            float_layout(size.H, bits, scale, block, every, compute=True),
        )

        def decoded(weight: EncodedWeight = weight, values: Tensor = values) -> Iterator[tuple[Tensor, Tensor]]:
            yield weight.decode(data.channels, data.dtype), values[data.channels].to(data.dtype)
            yield weight.decode(None, data.dtype), values.to(data.dtype)

        what = f"{bits} bits, scale {scale}, block {block}, every {every}"
        yield data.check(f"floats.float_rows, {what}", decoded, tolerance=0)

        def products(weight: EncodedWeight = weight, values: Tensor = values) -> Iterator[tuple[Tensor, Tensor]]:
            yield product_nt(x, weight, data.channels), x.double() @ values[data.channels].double().t()
            yield product_nn(h, weight, data.channels), h.double() @ values[data.channels].double()

        if weight.multiplies(data.dtype):  # Half a step of three bits of mantissa is 6 % of a value.
            yield data.check(f"fp8 products, {what}", products, tolerance=8)
    some, codes = torch.rand(size.H, device=data.device, generator=data.generator), data.bytes(size.C, size.H)

    def rounded() -> Iterator[tuple[Tensor, Tensor]]:
        for factors in (None, some):
            want = floats.to_fp8(x.float() if factors is None else x.float() * factors)
            got = fp8.round_rows(x, factors, -(-size.H // 16) * 16)
            yield got[0][:, : size.H], want[0]
            yield got[1], want[1]

    def turned() -> Iterator[tuple[Tensor, Tensor]]:
        got = fp8.turned(codes, -(-size.H // 16) * 16, -(-size.C // 16) * 16)
        yield got[: size.H, : size.C], codes.t()
        yield got.sum(), codes.sum()

    yield data.check("fp8.round_rows", rounded, tolerance=0)
    yield data.check("fp8.turned", turned, tolerance=0)


def _indexed_checks(data: Data, kind: str) -> Iterator[Check]:
    size, rows, channels = data.size, data.rows, data.channels
    x, h = data.normal(size.T, size.H), data.normal(size.T, size.C)
    low, b = data.normal(size.n, size.R), data.normal(size.H, size.R)
    chosen, every, values = data.weight(size.C, size.H, kind)
    bias, out_bias = data.normal(size.C), data.normal(size.H)
    start_nt, start_nn = data.normal(size.T, size.C), data.normal(size.T, size.H)
    kept, tokens = values[channels].double(), x[rows].double()
    nt = tokens @ kept.t()
    compact = h[rows][:, channels].contiguous()
    nn = compact.double() @ kept
    adapter = low.double() @ b.double().t() + out_bias.double()
    at = (rows[:, None], channels)

    def placed(start: Tensor, where: Any, value: Tensor, add: bool) -> Tensor:
        whole = start.double().clone()
        whole[where] = whole[where] + value if add else value
        return whole

    def plain_nt() -> Iterator[tuple[Tensor, Tensor]]:
        yield indexed_linear.indexed_nt(NTOperands(x, rows, channels, bias=bias), chosen), nt + bias[channels].double()
        yield indexed_linear.indexed_nt(NTOperands(x, None, None), every), x.double() @ values.double().t()

    def by_column() -> Iterator[tuple[Tensor, Tensor]]:
        part = columns.gather(h, rows, channels)
        yield part, h[rows][:, channels]
        for add in (False, True):
            got = columns.scatter(part, rows, channels, start_nt.clone(), add)
            yield got, placed(start_nt, at, part.double(), add)

    def into_rows() -> Iterator[tuple[Tensor, Tensor]]:
        for add in (False, True):
            operands = NNOperands(compact, rows, channels, start_nn.clone(), out_bias, low, b, add)
            yield indexed_linear.indexed_nn(operands, chosen), placed(start_nn, rows, nn + adapter, add)
        got = indexed_linear.indexed_nn(NNOperands(h, None, None, start_nn.clone()), every)
        yield got, h.double() @ values.double()

    def vendor() -> Iterator[tuple[Tensor, Tensor]]:
        stored = EncodedWeight((values,))
        got = vendor_nt(NTOperands(x, rows, channels, bias=bias), stored)
        yield got, nt + bias[channels].double()
        got = vendor_nn(NNOperands(compact, rows, channels, start_nn.clone(), out_bias, low, b), stored)
        yield got, placed(start_nn, rows, nn + adapter, False)

    if kind == "plain":  # Rows in NF4 are first decoded by the kernel that has checks of its own.
        yield data.check("indexed_linear.vendor forms", vendor)
        yield data.check("columns.gather and scatter", by_column)
    for name, run in (("indexed_nt", plain_nt), ("indexed_nn", into_rows)):
        yield data.check(f"indexed_linear.{name} {kind}", run)


def _gated_checks(data: Data, kind: str) -> Iterator[Check]:
    size, rows, channels = data.size, data.rows, data.channels
    x = data.normal(size.T, size.H)
    gate, _, gate_values = data.weight(size.C, size.H, kind)
    up, _, up_values = data.weight(size.C, size.H, kind)
    lows = {"gate_low": data.normal(size.T, size.R), "up_low": data.normal(size.T, size.R)}
    bs = {"gate_b": data.normal(size.C, size.R, scale=0.1), "up_b": data.normal(size.C, size.R, scale=0.1)}
    biases = {"gate_bias": data.normal(size.C), "up_bias": data.normal(size.C)}
    dh, g, u = (data.normal(size.n, size.k) for _ in range(3))
    start, tokens = data.normal(size.T, size.H), x[rows].double()

    def forward(name: str, extra: bool) -> Iterator[tuple[Tensor, Tensor]]:
        options = {**lows, **bs, **biases} if extra else {}
        got = gated_ffn.gated_forward(x, rows, gate, up, channels, activation=name, **options)
        want = []
        for side, values in (("gate", gate_values), ("up", up_values)):
            y = tokens @ values[channels].double().t()
            if extra:
                y = y + biases[f"{side}_bias"][channels].double()
                y = y + lows[f"{side}_low"][rows].double() @ bs[f"{side}_b"][channels].double().t()
            want.append(y)
        yield from zip(got, [*want, activate(name, want[0]) * want[1]])

    def backward(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        wide = [t.double() for t in (dh, g, u)]
        want = (activate_backward(name, wide[1], wide[0] * wide[2]), wide[0] * activate(name, wide[1]))
        yield from zip(gated_gradient.gated_backward(dh, g, u, name), want)

    def gradient() -> Iterator[tuple[Tensor, Tensor]]:
        sums = g.double() @ gate_values[channels].double() + u.double() @ up_values[channels].double()
        for add in (False, True):
            want = start.double().clone()
            want[rows] = want[rows] + sums if add else sums
            got = start.clone()
            gated_gradient.gated_input_gradient(g, u, gate, up, rows, channels, got, accumulate=add)
            yield got, want

    for name in ACTIVATIONS:
        yield data.check(f"gated_ffn.gated_forward {kind}, {name}", lambda name=name: forward(name, False))
        yield data.check(f"gated_gradient.gated_backward, {name}", lambda name=name: backward(name))
    yield data.check(f"gated_ffn.gated_forward {kind}, with adapter and bias", lambda: forward("silu", True))
    yield data.check(f"gated_gradient.gated_input_gradient {kind}", gradient)
