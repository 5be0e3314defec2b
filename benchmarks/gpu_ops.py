"""Every operation of the GPU path against its roofline, for benchmarks/gpu.py.

An operation cannot take less time than its bytes at the memory's bandwidth, nor than its FLOPs at the matrix units' peak.
Bytes are those that it must read and write once, FLOPs 2 a multiplication. The second-level cache is emptied before
every launch. Indexed products are timed beside the vendor's product on copied rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_kernel_cases import Data, Size
from gpu_timing import free, timed
from torch import Tensor

from sparselora_kernels import EncodedWeight
from sparselora_kernels.gpu import columns, gated_ffn, gated_gradient, indexed_linear, nf4, score, select
from sparselora_kernels.gpu.estimate import product_seconds
from sparselora_kernels.gpu.matrix import NF4Matrix
from sparselora_kernels.indexed_linear import takes_vendor, vendor_nn, vendor_nt
from sparselora_kernels.nf4 import BLOCK, blocks, scale_bytes
from sparselora_kernels.operands import NNOperands, NTOperands
from sparselora_kernels.rates import key_of, rates_of
from sparselora_kernels.reference.nf4 import LEVELS
from sparselora_kernels.select import kept_count

# (dense bf16 FLOP/s, bytes/s) of data sheets, by the first part of the device's name that is found.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100", 989e12, 3.35e12),
    ("H200", 989e12, 4.8e12),
    ("A100", 312e12, 2.0e12),
    ("B200", 2250e12, 8.0e12),
)
_FLUSH_BYTES = 256 << 20
REPEATS, WARM_UP = 15, 3


@dataclass(frozen=True, slots=True)
class Peak:
    """What the roofline is made of, and what one large product and one large copy reach."""

    flops: float
    bandwidth: float
    source: str
    measured_flops: float
    measured_bandwidth: float


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on one size."""

    name: str
    what: str
    flops: float
    bytes: float
    run: Callable[[], Any]
    vendor: Callable[[], Any] | None = None
    prefers_vendor: bool | None = None
    """What the rule says now."""
    rate: str = ""
    """Which of the rates that launchers choose by (``sparselora_kernels.rates``) it measures; none if empty."""
    predicted: float | None = None
    """Seconds that the launchers expect, by the rate that they have now."""


def find_peak(device: torch.device, tiny: bool) -> Peak:
    n = 256 if tiny else 8192
    dtype = torch.float32 if tiny else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty((1 << 20) if tiny else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * n**3 / _best(lambda: torch.mm(a, b), device)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for part, spec_flops, spec_bandwidth in PEAKS:
        if part in name:
            return Peak(spec_flops, spec_bandwidth, "data sheet", flops, bandwidth)
    return Peak(flops, bandwidth, "measured", flops, bandwidth)


def time_ops(device: torch.device, *, tiny: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each operation as it is measured; after ``seconds`` the rest is left out and said so."""
    end = time.monotonic() + seconds
    peak = find_peak(device, tiny)
    yield {
        "op": "peak",
        "what": f"{peak.source}: {peak.flops / 1e12:.4g} TFLOP/s, {peak.bandwidth / 1e12:.4g} TB/s; measured: "
        f"{peak.measured_flops / 1e12:.4g}, {peak.measured_bandwidth / 1e12:.4g}",
    }
    product = key_of("vendor", torch.float32 if tiny else torch.bfloat16)
    yield {"op": "large product", "rate": product, "reached": peak.measured_flops}
    yield {"op": "large copy", "rate": "memory", "reached": peak.measured_bandwidth}
    flush = torch.empty(1024 if tiny else _FLUSH_BYTES, dtype=torch.uint8, device=device)
    for op in all_ops(device, tiny):
        if time.monotonic() > end:
            yield {"op": op.name, "what": f"{op.what}: no time left, and so for the rest"}
            break
        try:
            yield _row(op, peak, device, flush, 1 if tiny else REPEATS)
        except torch.OutOfMemoryError:
            free()
            yield {"op": op.name, "what": f"{op.what}: out of memory"}
    free()


def _row(op: Op, peak: Peak, device: torch.device, flush: Tensor, repeats: int) -> dict[str, Any]:
    took = _median(op.run, device, flush, repeats)
    compute, memory = op.flops / peak.flops, op.bytes / peak.bandwidth
    row: dict[str, Any] = {
        "op": op.name,
        "what": op.what,
        "us": took * 1e6,
        "roofline us": max(compute, memory) * 1e6,
        "share of roofline": max(compute, memory) / took,
        "bound by": "compute" if compute > memory else "memory",
    }
    if op.rate:
        # Of a product: the rate by which its tiles would have been expected to take this long.
        known = rates_of(device)[op.rate]
        row |= {"rate": op.rate, "reached": known * op.predicted / took if op.predicted else op.bytes / took}
    if op.vendor is not None:
        vendor = _median(op.vendor, device, flush, repeats)
        row |= {
            "vendor us": vendor * 1e6,
            "faster": "vendor" if vendor < took else "own",
            "by": _ratio(vendor, took),
        }
        if op.prefers_vendor is not None:
            row["rule says"] = "vendor" if op.prefers_vendor else "own"
    return row


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


def _median(run: Callable[[], Any], device: torch.device, flush: Tensor, repeats: int) -> float:
    for _ in range(1 if repeats < WARM_UP else WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        times.append(timed(run, device, hide=True))
    return statistics.median(times)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(2):
        run()
    return min(timed(run, device, hide=True) for _ in range(5))


# --- operations -------------------------------------------------------------------------------------------------------


def all_ops(device: torch.device, tiny: bool) -> Iterator[Op]:
    """Those of a layer of the math setting first (75 % of 8192 tokens are context), then the grid for the vendor rule."""
    dtype = torch.float32 if tiny else torch.bfloat16
    if tiny:
        layers, grid = ((64, 32, 32, 32),), ((8, 4, 64),)
    else:
        layers = ((4096, 14336, 1024, 8192), (8192, 28672, 1024, 8192))
        grid = tuple(
            (n, k, length)
            for length in (4096, 8192)
            for k in (32, 144, 432, 1024, 3072)
            for n in (512, 1536, 6144, 16384)
        )
    for hidden, width, kv, tokens in layers:
        kept, context = max(4, kept_count(width, 0.99)), tokens * 3 // 4
        for kind in ("plain", "nf4"):
            yield from _ffn_ops(Data(_size(tokens, hidden, width, context, kept), device, dtype), kind)
            yield from _attention_ops(Data(_size(tokens, hidden, hidden, context, hidden // 4), device, dtype), kind)
            yield from _attention_ops(Data(_size(tokens, hidden, kv, context, kv // 4), device, dtype), kind)
        yield from _choice_ops(Data(_size(tokens, hidden, width, context, kept), device, dtype))
        yield from _decode_ops(Data(_size(tokens, hidden, width, context, kept), device, dtype))
    for n, k, length in grid:
        for kind in ("plain", "nf4"):
            yield from _vendor_ops(Data(_size(n, length, 4 * k, n, k), device, dtype), kind)


def _size(tokens: int, hidden: int, channels: int, context: int, kept: int) -> Size:
    return Size(T=tokens, H=hidden, C=channels, n=context, k=kept, R=32)


def _matrix(data: Data, kind: str) -> tuple[Any, float, Callable[[], Tensor]]:
    """A (C, H) weight as the kernels take it for the chosen channels, the bytes of a row, and what copies the chosen rows
    out for the vendor's product: NF4 by the decoding kernel."""
    size, item = data.size, data.dtype.itemsize
    if kind == "plain":
        plain = data.normal(size.C, size.H, scale=0.02)
        return plain, size.H * item, lambda: plain.index_select(0, data.channels)
    codes = data.bytes(size.C, blocks(size.H) * BLOCK // 2)
    scales = torch.rand(size.C, blocks(size.H), device=data.device)
    levels, table = torch.tensor(LEVELS, device=data.device), torch.linspace(-1, 1, 256, device=data.device)
    options = {"length": size.H, "double_quant": False, "first": 0}
    decode = partial(nf4.nf4_rows, codes, scales.view(torch.uint8), data.channels, levels, table, data.dtype, **options)
    chosen = scales.index_select(0, data.channels)
    return NF4Matrix(codes, chosen, levels, size.H), size.H * (0.5 + 4 / BLOCK), decode


def _name(data: Data, kind: str) -> str:
    size = data.size
    return f"{kind}, n {size.n}, k {size.k} of {size.C}, length {size.H}"


def _ffn_ops(data: Data, kind: str) -> Iterator[Op]:
    size, e = data.size, data.dtype.itemsize
    n, k, h = size.n, size.k, size.H
    x = data.normal(size.T, h)
    (gate, row, rows_of_gate), (up, _, rows_of_up) = _matrix(data, kind), _matrix(data, kind)
    what = _name(data, kind)

    def vendor_forward() -> Tensor:
        tokens = x.index_select(0, data.rows)
        return torch.nn.functional.silu(tokens @ rows_of_gate().t()) * (tokens @ rows_of_up().t())

    yield Op(
        "gated_forward", what, 4 * n * k * h, n * h * e + 2 * k * row + 3 * n * k * e,
        lambda: gated_ffn.gated_forward(x, data.rows, gate, up, data.channels, activation="silu"),
        vendor_forward, _rule(data, kind, "gated"), _rate(data, kind, "gated"), _predicted(data, kind, "gated"),
    )  # fmt: skip
    dh, g, u = (data.normal(n, k) for _ in range(3))
    if kind == "plain":
        yield Op("gated_backward", what, 0, 5 * n * k * e, lambda: gated_gradient.gated_backward(dh, g, u, "silu"))
    out = data.normal(size.T, h)
    yield Op(
        "gated_input_gradient", what, 4 * n * k * h, n * h * e + 2 * k * row + 2 * n * k * e,
        lambda: gated_gradient.gated_input_gradient(g, u, gate, up, data.rows, data.channels, out),
        lambda: out.index_copy_(0, data.rows, torch.addmm(g @ rows_of_gate(), u, rows_of_up())),
        _rule(data, kind, "gradient"), _rate(data, kind, "gradient"), _predicted(data, kind, "gradient"),
    )  # fmt: skip
    yield Op(
        "indexed_nn (down)", what, 2 * n * k * h, n * h * e + k * row + n * k * e,
        lambda: indexed_linear.indexed_nn(NNOperands(g, data.rows, data.channels, out), up),
        lambda: vendor_nn(NNOperands(g, data.rows, None, out), EncodedWeight((rows_of_up(),))),
        _rule(data, kind, "nn"), _rate(data, kind, "nn"), _predicted(data, kind, "nn"),
    )  # fmt: skip


def _attention_ops(data: Data, kind: str) -> Iterator[Op]:
    """Products by row, and the copies around them of what is by column."""
    size, e = data.size, data.dtype.itemsize
    n, k, h = size.n, size.k, size.H
    weight, row, rows_of = _matrix(data, kind)
    x, full, out = data.normal(size.T, h), data.normal(size.T, size.C), data.normal(size.T, h)
    compact, what = data.normal(n, k), _name(data, kind)
    yield Op(
        "indexed_nt (q, k, v)", what, 2 * n * k * h, n * h * e + k * row + n * k * e,
        lambda: indexed_linear.indexed_nt(NTOperands(x, data.rows, data.channels), weight),
        lambda: vendor_nt(NTOperands(x, data.rows, None), EncodedWeight((rows_of(),))),
        _rule(data, kind, "nt"), _rate(data, kind, "nt"), _predicted(data, kind, "nt"),
    )  # fmt: skip
    yield Op(
        "indexed_nn (o)", what, 2 * n * k * h, n * h * e + k * row + n * k * e,
        lambda: indexed_linear.indexed_nn(NNOperands(compact, data.rows, data.channels, out), weight),
        lambda: vendor_nn(NNOperands(compact, data.rows, None, out), EncodedWeight((rows_of(),))),
        _rule(data, kind, "nn"), _rate(data, kind, "nn"), _predicted(data, kind, "nn"),
    )  # fmt: skip
    if kind == "plain":
        lists = data.rows, data.channels
        yield Op(
            "gather", what, 0, n * (size.C + k) * e, lambda: columns.gather(full, *lists), lambda: _gather(full, data)
        )
        yield Op(
            "scatter, added", what, 0, n * (2 * size.C + k) * e,
            lambda: columns.scatter(compact, *lists, full, True), lambda: _scatter(full, data, compact),
        )  # fmt: skip


def _vendor_ops(data: Data, kind: str) -> Iterator[Op]:
    size, e = data.size, data.dtype.itemsize
    n, k, h = size.n, size.k, size.H
    weight, row, rows_of = _matrix(data, kind)
    x, hidden, out = data.normal(n, h), data.normal(n, k), data.normal(n, h)
    flops, moved, what = 2 * n * k * h, n * h * e + k * row + n * k * e, _name(data, kind)
    yield Op(
        "indexed_nt (grid)", what, flops, moved,
        lambda: indexed_linear.indexed_nt(NTOperands(x, data.rows, data.channels), weight),
        lambda: vendor_nt(NTOperands(x, data.rows, None), EncodedWeight((rows_of(),))),
        _rule(data, kind, "nt"), _rate(data, kind, "nt"), _predicted(data, kind, "nt"),
    )  # fmt: skip
    yield Op(
        "indexed_nn (grid)", what, flops, moved,
        lambda: indexed_linear.indexed_nn(NNOperands(hidden, data.rows, data.channels, out), weight),
        lambda: vendor_nn(NNOperands(hidden, data.rows, None, out), EncodedWeight((rows_of(),))),
        _rule(data, kind, "nn"), _rate(data, kind, "nn"), _predicted(data, kind, "nn"),
    )  # fmt: skip


def _rule(data: Data, kind: str, product: str) -> bool:
    size = data.size
    return takes_vendor(product, size.n, size.k, size.H, data.dtype, data.device, nf4=kind == "nf4")


def _predicted(data: Data, kind: str, product: str) -> float:
    size = data.size
    return product_seconds(product, size.n, size.k, size.H, data.dtype, nf4=kind == "nf4", device=data.device)


def _rate(data: Data, kind: str, product: str) -> str:
    return key_of(product, data.dtype, nf4=kind == "nf4")


def _gather(full: Tensor, data: Data) -> Tensor:
    return full.index_select(0, data.rows).index_select(1, data.channels)


def _scatter(full: Tensor, data: Data, y: Tensor) -> Tensor:
    """``full[rows, channels] += y`` without a kernel of our own."""
    return full.index_copy_(0, data.rows, full.index_select(0, data.rows).index_add_(1, data.channels, y))


def _choice_ops(data: Data) -> Iterator[Op]:
    """Scores and selection."""
    size, e, rank = data.size, data.dtype.itemsize, 8
    x = data.normal(size.T, size.H)
    gate, up = ((data.normal(rank, size.H), data.normal(size.C, rank)) for _ in range(2))
    what = f"n {size.n}, width {size.C}, rank {rank}, hidden {size.H}"
    read = size.T * size.H * e
    yield Op(
        "gated_ffn_score", what, 4 * rank * (size.T * size.H + size.n * size.C), read + 4 * rank * (size.H + size.C) * e,
        lambda: score.gated_ffn_score(x, data.rows, gate, up, "silu"),
    )  # fmt: skip
    outs = (size.H, 1024, 1024)
    a, b = [data.normal(rank, size.H) for _ in outs], [data.normal(out, rank) for out in outs]
    yield Op(
        "projection_scores (q, k, v)", what, 2 * rank * (3 * size.T * size.H + size.n * sum(outs)), read,
        lambda: score.projection_scores(x, data.rows, a, b),
    )  # fmt: skip
    yield Op("rows copied", what, 0, 2 * size.n * size.H * e, lambda: x.index_select(0, data.rows), rate="copy")
    scores = torch.rand(size.C, device=data.device)
    yield Op("select_channels", what, 0, 4 * size.C + 8 * size.k, lambda: select.select_channels(scores, size.k))


def _decode_ops(data: Data) -> Iterator[Op]:
    size = data.size
    codes = data.bytes(size.C, blocks(size.H) * BLOCK // 2)
    scales = data.bytes(size.C, scale_bytes(size.H, True))
    tables = torch.tensor(LEVELS, device=data.device), torch.linspace(-1, 1, 256, device=data.device)
    for kind, channels in (("kept", data.channels), ("all", None)):
        count = size.k if channels is not None else size.C
        moved = count * (codes.shape[1] + scales.shape[1] + size.H * data.dtype.itemsize)
        options = {"length": size.H, "double_quant": True, "first": 0}
        run = partial(nf4.nf4_rows, codes, scales, channels, *tables, data.dtype, **options)
        yield Op("nf4_rows", f"{kind}, {count} rows of {size.H}", 0, moved, run)
