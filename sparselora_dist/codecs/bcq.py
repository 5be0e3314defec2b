"""Binary coding: values as sums of signed scales, ±s_0 ± s_1 ... per group; ShiftAdd's scales are sums of powers of two.

Greedy start, then in turn the best scales for the signs (least squares) and the best signs for the scales (the nearest of
the 2^q levels), as in BCQ (arXiv 1802.00150) and ShiftAddLLM (2406.05981). The values of a group are sorted once. A level
then has a run of them, and a round needs the counts and sums of 2^q runs, not the values: both come from running sums.

Values are whole numbers here, 2^24 the largest of the group, and weights are, 2^20 the largest: every sum is exact in fp64
in whatever order it is taken, so that a group becomes the same however rows are split, on a CPU and on a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .grouped import FEW, in_groups

ROUNDS = 50
"""At most; a group is done when its scales stay. On normal values that takes 5, 10 and 12 on average (2, 3, 4 bits)."""
TERMS = 3
"""Powers of two in a scale of ShiftAdd."""
_VALUE, _WEIGHT, _FAR = 2.0**24, 2.0**20, 2.0**30


def quantize(rows: Tensor, bits: int, *, powers: bool = False, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows (n, length).

    Args:
        rows: floating point, finite.
        bits: signs and scales.
        powers: round scales to sums of up to three powers of two, plus or minus, and search the signs again.
        weights: of the squared error of each value (n, length), or of each column (length,): at least 0; none: all 1.

    Returns:
        Codes (n, nb·128) uint8 and scales (n, nb, bits) fp16. A scale beyond fp16 is infinite.
    """

    def quantizer(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        scales = fit(values, bits, importance).half()
        if powers:
            scales = sums_of_powers(scales)
        return nearest(values, scales), scales

    return in_groups(quantizer, rows, weights, bits)


@cache
def _signs(bits: int, device: torch.device) -> Tensor:
    """Of every code, (2^bits, bits) fp64."""
    return (2 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) - 1).double().to(device)


def fit(values: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Scales (g, bits) fp32 of groups (g, width) fp32, with weights (g, width) or none."""
    top = values.abs().amax(1, keepdim=True)
    whole = (values / top.where(top > 0, 1.0)).mul_(_VALUE).round_()
    mass = None
    if weights is not None:
        most = weights.amax(1, keepdim=True)
        # A group without a weight is one of equal weights.
        mass = (weights / most.where(most > 0, 1.0)).mul_(_WEIGHT).round_().where(most > 0, 1.0).double()
    scales = _greedy(whole, mass, bits)
    ordered, mass = _sorted(whole.int(), mass)
    total = ordered.double() if mass is None else ordered * mass
    sums = torch.nn.functional.pad(total.cumsum(1), (1, 0))
    counts = None if mass is None else torch.nn.functional.pad(mass.cumsum(1), (1, 0))
    return (_alternate(scales, ordered, sums, counts) * (top.double() / _VALUE)).float()


def _greedy(whole: Tensor, mass: Tensor | None, bits: int) -> Tensor:
    """Each scale is the mean magnitude of what those before it leave: (g, bits) fp64."""
    rest, scales = whole, []
    for _ in range(bits):
        size = rest.abs()
        if mass is None:
            mean = size.sum(1, dtype=torch.float64) / size.shape[1]
        else:
            mean = (size * mass).sum(1) / mass.sum(1)
        scales.append(mean.round_())
        rest = rest - torch.copysign(scales[-1].float()[:, None], rest)
    return torch.stack(scales, 1)


def _sorted(whole: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Every group (g, width) int32 ascending, and its weights in that order."""
    if mass is not None:
        whole, order = whole.sort(dim=1, stable=True)
        return whole, mass.gather(1, order)
    if whole.device.type != "cpu":
        return whole.sort(dim=1).values, None
    whole.numpy().sort(axis=1)  # Several times faster than torch.
    return whole, None


def _alternate(scales: Tensor, ordered: Tensor, sums: Tensor, counts: Tensor | None) -> Tensor:
    """Improve scales (g, bits) in turn with the signs.

    Args:
        ordered: (g, width) int32 ascending.
        sums, counts: (g, width + 1) fp64, of the weighted values and of the weights before each place.
    """
    g, bits = scales.shape
    signs = _signs(bits, scales.device)
    pairs = (signs[:, :, None] * signs[:, None, :]).view(-1, bits * bits)
    done, active = scales.clone(), torch.arange(g, device=scales.device)
    for _ in range(ROUNDS):
        levels, codes = _levels(scales, signs)
        # A value at the middle of two levels goes to the lower one.
        middles = (levels[:, 1:] + levels[:, :-1]).div_(2).floor_().clamp_(-_FAR, _FAR).int()
        ends = torch.nn.functional.pad(torch.searchsorted(ordered, middles, right=True), (1, 0))
        ends = torch.cat([ends, torch.full_like(ends[:, :1], ordered.shape[1])], 1)
        by_code = torch.empty_like(levels)
        run = (ends.double() if counts is None else counts.gather(1, ends)).diff(dim=1)
        gram = pairs.t() @ by_code.scatter_(1, codes, run).t()
        right = signs.t() @ by_code.scatter_(1, codes, sums.gather(1, ends).diff(dim=1)).t()
        improved = solve(gram.view(bits, bits, -1), right).t().contiguous()
        moved = (improved != scales).any(1)
        left, scales = int(moved.sum()), improved
        if left < FEW * len(moved):  # What is done stays as it is, computed again or not.
            done[active] = scales
            active, scales, ordered, sums = (x[moved] for x in (active, scales, ordered, sums))
            counts = None if counts is None else counts[moved]
            if not left:
                return done
    done[active] = scales
    return done


def _levels(scales: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of scales (g, bits) ascending, and their codes, int64: (g, 2^bits) each."""
    found = _signed_sums(scales, signs).sort(dim=1, stable=True)
    return found.values, found.indices


def _signed_sums(scales: Tensor, signs: Tensor) -> Tensor:
    """((±s_0) ± s_1) ± ... of every code, (g, 2^bits), in this order, as a decoder computes it."""
    levels = scales[:, :1] * signs[:, 0]
    for i in range(1, scales.shape[1]):
        levels = levels + scales[:, i : i + 1] * signs[:, i]
    return levels


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """x of gram · x = right, (q, g), for symmetric (q, q, g), by elimination; 0 for what depends on those before it."""
    q = right.shape[0]
    rows = [[gram[i, j] for j in range(q)] for i in range(q)]
    values, inverse = list(right), []
    for k in range(q):
        pivot = rows[k][k]
        independent = pivot > 1e-9 * gram[0, 0]
        inverse.append(independent / pivot.where(independent, 1.0))
        for i in range(k + 1, q):
            factor = rows[k][i] * inverse[k]
            for j in range(i, q):
                rows[i][j] = rows[i][j] - factor * rows[k][j]
            values[i] = values[i] - factor * values[k]
    for k in reversed(range(q)):
        for j in range(k + 1, q):
            values[k] = values[k] - rows[k][j] * values[j]
        values[k] = values[k] * inverse[k]
    return torch.stack(values)


def nearest(values: Tensor, scales: Tensor) -> Tensor:
    """Codes (g, width) uint8 of the levels of scales (g, bits) fp16 that are nearest to values (g, width) fp32."""
    signs = _signs(scales.shape[1], scales.device).float()
    levels, codes = _levels(scales.float(), signs)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    place = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for middle in middles.split(1, 1):
        place += values > middle
    return codes.to(torch.uint8).gather(1, place.long())


def sums_of_powers(scales: Tensor) -> Tensor:
    """fp16 numbers, each replaced by the nearest power of two, plus that nearest to what is left, :data:`TERMS` in all."""
    rest = scales.float()
    found = torch.zeros_like(rest)
    for _ in range(TERMS):
        # From 1.5 times a power on, the next one is nearer: half a mantissa is added, and the mantissa cut off.
        bits = rest.view(torch.int32)
        power = ((bits + (1 << 22)) & (-1 << 23)).view(torch.float32)
        found, rest = found + power, rest - power
    return found.half()
