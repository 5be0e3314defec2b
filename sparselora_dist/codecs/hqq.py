"""Half-quadratic quantisation (HQQ, Badri and Shaji 2023): value = (code - zero) · scale, a scale and a zero per group.

The scale spans the group. The zero is searched for which the error is small in the norm l_0.7, which forgives outliers:

    e     = shrink(w - (q - zero) · scale)      what is taken for outliers
    zero  = mean(q - (w - e) / scale)

with q the codes of the last zero. The published settings: shrink(x) = sign(x) · max(|x| - |x|^-0.3 / beta, 0), beta 10,
times 1.01 a round, 20 rounds. The library stops when a matrix' mean error grows; here a row becomes the same whatever rows
are beside it, so that a group is only left out when it would stay as it is. The scale is rounded to fp16 first, not last,
and the codes are searched again for the numbers that are stored.

What is summed is rounded to multiples of 2^-20 of a code: sums are then exact in fp64, in whatever order they are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped import FEW, in_groups

ROUNDS = 20
BETA, KAPPA = 10.0, 1.01
LEAST = 2.0**-24
"""The smallest scale, fp16's smallest number."""
FARTHEST = 1024
"""No zero is farther from the codes, or fp16 would round it by more than half a code: where a group's values differ by
less than its largest magnitude over so many, the scale spans more than they do."""
_GRID = 2.0**20


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and numbers of rows (n, length), floating point, finite.

    Returns:
        Codes (n, nb·128) uint8 and numbers (n, nb, 2) fp16: scale, zero. A number beyond fp16 is infinite.
    """

    def quantizer(values: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, zero = fit(values, bits)
        stored = torch.cat([scale, zero], 1).half()
        return nearest(values, stored, bits), stored

    return in_groups(quantizer, rows, None, 2)


def fit(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, (g, 1) fp32 each, of groups (g, width) fp32."""
    top = 2**bits - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = torch.maximum((high - low) / top, torch.maximum(-low, high) / FARTHEST)
    scale = scale.half().float().clamp_(min=LEAST)
    return scale, _search(values / scale, -low / scale, scale, top)


def _search(steps: Tensor, zero: Tensor, scale: Tensor, top: int) -> Tensor:
    """The best zeros (g, 1) of groups (g, width) that were divided by their scale (g, 1), from ``zero`` on."""
    found, active = zero.clone(), torch.arange(len(zero), device=zero.device)
    for n in range(ROUNDS):
        offset = (steps + zero).round_().clamp_(0, top).sub_(steps)
        low, high = offset.aminmax(dim=1, keepdim=True)
        outlying = torch.maximum(high - zero, zero - low) * scale > free(BETA * KAPPA**ROUNDS)
        if bool(outlying.any()):
            improved = _mean(offset + shrink((zero - offset) * scale, BETA * KAPPA**n) / scale)
        else:
            improved = _mean(offset)
        moved = ((improved != zero) | outlying)[:, 0]
        left, zero = int(moved.sum()), improved
        if left < FEW * len(moved):
            found[active] = zero
            active, steps, zero, scale = (x[moved] for x in (active, steps, zero, scale))
            if not left:
                return found
    found[active] = zero
    return found


def _mean(values: Tensor) -> Tensor:
    """(g, 1) fp32 of (g, width)."""
    whole = (values * _GRID).round_().sum(1, keepdim=True, dtype=torch.float64)
    return (whole / (_GRID * values.shape[1])).float()


def free(beta: float) -> float:
    """Up to this size, :func:`shrink` leaves nothing."""
    return 0.99 * float(beta ** (-1 / 1.3))


def shrink(x: Tensor, beta: float) -> Tensor:
    """sign(x) · max(|x| - |x|^-0.3 / beta, 0), fp32."""
    size = x.abs()
    some = size > free(beta)
    chosen = size[some]
    left = torch.zeros_like(x)
    left[some] = (chosen - inverse_power(chosen) / beta).clamp_(min=0)
    return left.copysign_(x)


def inverse_power(x: Tensor) -> Tensor:
    """x^-0.3 of positive x, fp32. By Newton's rule on x³ · y¹⁰ = 1: a library's power rounds the last values of a tensor
    otherwise than those before."""
    exact = x.double()
    cube = exact * exact * exact
    # The exponent and the mantissa as one number, which is nearly a logarithm.
    y = (-0.3 * (exact.view(torch.int64) - (1023 << 52)).double()).long().add_(1023 << 52).view(torch.float64)
    for _ in range(5):
        square = y * y
        fourth = square * square
        y = y * (1.1 - 0.1 * (cube * fourth * fourth * square))
    return y.float()


def nearest(values: Tensor, stored: Tensor, bits: int) -> Tensor:
    """Codes (g, width) uint8 for numbers (g, 2) fp16 that are stored."""
    scale, zero = stored.float().split(1, 1)
    return (values / scale + zero).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
