"""BiLLM's binarisation (Huang et al. 2024, arXiv 2402.04291): 128 values of a row in two bits a value and seven numbers.

Columns that matter most are binarised twice, w ≈ mu + a1·sign(w − mu) + a2·sign(what is left). The others are split where
|w| passes a break point, and each half is binarised around its mean, w ≈ mu_g + a_g·sign(w − mu_g). The columns are shared
by all rows, the break point is each group's own: of the candidates the one with the least error.

Numbers are rounded to fp16, as they are stored, before signs are chosen: a code is the nearest of the four values that its
group can decode to, so that a value near the break point may go to the other half. Codes are those of
:mod:`sparselora_kernels.levels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
MOST = 49
"""Of the 128 columns of a block, how many may be salient."""
_COUNTS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 40, MOST)
# Rows by which the number of columns is chosen.
_SAMPLE = 512
# Break points by the largest magnitude of a group; the best of a Gaussian is at 0.38.
BREAKS = tuple(0.1 + 0.05 * step for step in range(17))
_FEW_BREAKS = BREAKS[3:9:2]
# Values of a chunk of candidates: a row alone takes them all at once.
_CHUNK = 1 << 21


def salient_columns(rows: Tensor, costs: Tensor, valid: Tensor) -> Tensor:
    """Which columns of a block are binarised twice, for all rows: (128,) bool.

    Args:
        rows: (n, 128) fp32.
        costs: what a squared error costs, broadcast to (n, 128): ``1 / U_ii²`` of the inverse second moments' factor.
        valid: (128,) bool, the columns that are not padding.
    """
    worth = (rows.square() * costs).sum(0).masked_fill(~valid, -1.0)
    order = worth.argsort(descending=True, stable=True)
    spread = torch.arange(0, rows.shape[0], max(1, rows.shape[0] // _SAMPLE), device=rows.device)
    sample = rows[spread]
    weights = costs.expand_as(rows)[spread] * valid
    best, least = torch.zeros_like(valid), float("inf")
    for count in _COUNTS:
        if count >= valid.sum():
            break
        salient = torch.zeros_like(valid)
        salient[order[:count]] = True
        tables = tables_of(fit_groups(sample, salient[None], valid[None], _FEW_BREAKS))
        _, decoded = nearest(sample, *tables, salient[None])
        error = ((sample - decoded).square() * weights).sum().item()
        if error < least:
            best, least = salient, error
    return best


def fit_groups(groups: Tensor, salient: Tensor, valid: Tensor, breaks: tuple[float, ...] = BREAKS) -> Tensor:
    """The numbers of groups, (n, 7) fp16.

    Args:
        groups: (n, 128) fp32.
        salient, valid: bool, (n, 128) or (1, 128): the columns binarised twice, and those that are not padding.
        breaks: candidates, of the largest magnitude among the others.

    Raises:
        ValueError: a number is not finite in fp16.
    """
    params = torch.cat([_split(groups, ~salient & valid, breaks), _residual(groups, salient & valid)], 1).half()
    if not bool(params.isfinite().all()):
        raise ValueError("a weight is NaN, Inf or beyond what fp16 scales can hold, which billm cannot store")
    return params


def tables_of(params: Tensor) -> tuple[Tensor, Tensor]:
    """What codes 0 ... 3 decode to, in an ordinary and in a salient column: (n, 4) fp32 each."""
    inner, a_inner, outer, a_outer, mu, first, second = params.float().unbind(1)
    once = torch.stack([inner - a_inner, outer - a_outer, inner + a_inner, outer + a_outer], 1)
    low, high = mu - first, mu + first
    return once, torch.stack([low - second, high - second, low + second, high + second], 1)


def nearest(groups: Tensor, once: Tensor, twice: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (n, k) uint8 of the nearest of the values that each column can have, of equal ones the first; and these,
    fp32.

    Args:
        groups: (n, k) fp32.
        once, twice: (n, L) fp32, what codes decode to in an ordinary and in a salient column.
        salient: bool, (n, k) or (1, k).
    """
    values = once[:, None] if once is twice else torch.where(salient[..., None], twice[:, None], once[:, None])
    codes = (groups[..., None] - values).abs_().argmin(-1, keepdim=True)
    return codes[..., 0].to(torch.uint8), values.expand(*groups.shape, -1).gather(-1, codes)[..., 0]


def _mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Of the last dimension where ``mask`` is; 0 of none."""
    return (values * mask).sum(-1, keepdim=True) / count


def _binarised(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale (..., 1) of the values under ``mask``, and how much squared error they save."""
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    mu = _mean(values, mask, count)
    scale = _mean((values - mu).abs_(), mask, count)
    return mu, scale, count * (mu.square() + scale.square())


def _split(groups: Tensor, once: Tensor, breaks: tuple[float, ...]) -> Tensor:
    """mu and a of the inner and of the outer half, at the best of the break points: (n, 4) fp32."""
    size = groups.abs()
    largest = (size * once).amax(1, keepdim=True)
    found: Tensor | None = None
    most = groups.new_full((groups.shape[0], 1), -1.0)
    step = max(1, _CHUNK // max(1, groups.numel()))
    for start in range(0, len(breaks), step):
        points = torch.tensor(breaks[start : start + step], device=groups.device).view(-1, 1, 1) * largest
        outside = size > points
        inner, outer = _binarised(groups, once & ~outside), _binarised(groups, once & outside)
        saved = inner[2] + outer[2]
        params = torch.cat([*inner[:2], *outer[:2]], -1)
        gain, which = saved.max(0, keepdim=True)
        params = params.gather(0, which.expand(1, -1, 4))[0]
        found = params if found is None else torch.where(gain[0] > most, params, found)
        most = torch.maximum(most, gain[0])
    assert found is not None
    return found


def _residual(groups: Tensor, twice: Tensor) -> Tensor:
    """mu, a1 and a2 of the columns that are binarised twice: (n, 3) fp32."""
    mu, first, _ = _binarised(groups, twice)
    left = groups - mu
    left = left - first * torch.where(left >= 0, 1.0, -1.0)
    second = _mean(left.abs(), twice, twice.sum(-1, keepdim=True).clamp_min(1))
    return torch.cat([mu, first, second], 1)
