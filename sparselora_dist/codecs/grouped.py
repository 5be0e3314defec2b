"""Quantisers of groups: cuts rows into groups of 128 values and what is left of a row, a bounded number at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparselora_kernels.levels import GROUP, groups

Quantizer = Callable[[Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
"""From groups (g, width) fp32 and the weights of their errors, or ``None``: codes (g, width) uint8 and numbers (g, p) fp16.
What it makes of a group must not depend on the other groups."""

FEW = 0.75
"""Groups that stay as they are are taken out when a smaller part than this is left: computed again they stay, too."""
# Values at once: on a CPU few enough for the caches, elsewhere enough to fill the device.
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 23


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """The rows of (n, length), as many in a slice as are quantised at once."""
    most = _CPU_CHUNK if rows.device.type == "cpu" else _CHUNK
    step = max(most // max(rows.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def in_groups(quantizer: Quantizer, rows: Tensor, weights: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Quantise rows (n, length), floating point, with ``count`` numbers a group.

    Args:
        weights: of the squared error of each value (n, length), or of each column (length,); none are negative.

    Returns:
        Codes (n, nb·128) uint8, zeros after the last value of a row, and numbers (n, nb, count) fp16.
    """
    n, length = rows.shape
    nb, whole = groups(length), length // GROUP * GROUP
    codes = torch.zeros(n, nb * GROUP, dtype=torch.uint8, device=rows.device)
    params = torch.empty(n, nb, count, dtype=torch.float16, device=rows.device)
    if weights is not None:
        weights = weights.expand(n, length)
    for chunk in row_chunks(rows):
        for columns, width in ((slice(0, whole), GROUP), (slice(whole, length), length - whole)):
            own = slice(columns.start // GROUP, -(-columns.stop // GROUP))
            if own.start == own.stop:
                continue
            cut = [None if x is None else x[chunk, columns].float().reshape(-1, width) for x in (rows, weights)]
            assert cut[0] is not None
            found, numbers = quantizer(cut[0], cut[1])
            codes[chunk, columns] = found.view(-1, columns.stop - columns.start)
            params[chunk, own] = numbers.view(-1, own.stop - own.start, count)
    return codes, params
