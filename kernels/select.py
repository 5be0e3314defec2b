"""Choosing channels: how many, and which.

    k = ceil((1 - s) · n), from n = 2048 on up to the next multiple of 16
    kept = indices of the k largest scores, ascending; among equal scores the lowest index wins

``torch.topk`` promises nothing about ties and ranks NaN first, so that two ranks with equal scores could choose
differently. A stable sort does not, nor does the kernel that a GPU uses for up to 32768 channels.

NaN counts as -inf: the result is valid and the same everywhere. Whoever needs to know asks for the flag beside it, which
the same launch writes (mask synchronisation reads it before the step is taken).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import use_triton
from .operator import register

# (1 - 0.7) * 10 is 3.0000000000000004 in floating point; the ceiling must still be 3.
_ROUNDING = 1e-9
# A product whose width is no multiple of 16 loads narrowly on a GPU. At real widths the rest of a tile is 0.7 % at most.
_TILE, _WIDE = 16, 2048
_UNIT, _WIDE_EXPERT = 8, 256


def kept_count(channels: int, sparsity: float) -> int:
    """``k = ceil((1 - sparsity) · channels)``, at least 1, for ``sparsity`` in [0, 1); a multiple of 16, or all
    ``channels``, where there are 2048 or more."""
    kept = max(1, math.ceil((1.0 - sparsity) * channels * (1.0 - _ROUNDING)))
    return kept if channels < _WIDE else min(-(-kept // _TILE) * _TILE, channels)


def kept_per_expert(width: int, sparsity: float) -> int:
    """:func:`kept_count` of one expert of ``width`` neurons; a multiple of 8, or all, where there are 256 or more: rows of
    a GPU's grouped products begin at multiples of 16 bytes, and narrower ones would be copied."""
    kept = kept_count(width, sparsity)
    return kept if width < _WIDE_EXPERT else min(-(-kept // _UNIT) * _UNIT, width)


def select_channels(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest of ``scores`` (n,) fp32, ascending, int64. Does not wait for the device.

    All of them where ``keep`` is larger than n.
    """
    return select_checked(scores, keep)[0]


def select_checked(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """:func:`select_channels`, and a flag (1,) fp32 that is zero only if every score is finite."""
    return _run(scores.detach(), keep)


def _select(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    if use_triton(scores) and scores.dtype == torch.float32 and min(keep, scores.shape[0]) > 0:
        from .gpu import select

        if scores.shape[0] <= select.LARGEST:
            with torch.cuda.device_of(scores):
                flag = torch.empty_like(scores[:1])
                return select.select_channels(scores, min(keep, scores.shape[0]), flag), flag
    # In fp64 a sum of fp32 values cannot overflow; what is not finite gives NaN.
    flag = scores.sum(0, keepdim=True, dtype=torch.float64).mul_(0.0).float()
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values, flag


def _select_fake(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    kept = scores.new_empty(min(keep, scores.shape[0]), dtype=torch.int64)
    return kept, scores.new_empty(1, dtype=torch.float32)


_run = register("select_channels", _select, _select_fake)


def select_grouped(scores: Tensor, experts: int, keep: int) -> tuple[Tensor, Tensor]:
    """The ``keep`` largest of each expert: (E·W,) fp32 -> (E·keep,) int64 ascending, and the flag of
    :func:`select_checked`. Among equal scores, as of an expert that no token reached, the lowest index wins."""
    flag = scores.sum(0, keepdim=True, dtype=torch.float64).mul_(0.0).float()
    table = scores.masked_fill(scores.isnan(), -math.inf).view(experts, -1)
    order = torch.sort(table, stable=True, dim=1, descending=True).indices[:, :keep].sort(1).values
    return (order + torch.arange(experts, device=scores.device)[:, None] * table.shape[1]).flatten(), flag
