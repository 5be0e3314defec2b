"""Whether a product of chosen tokens and channels is the vendor's on copied rows, or one of ours that reads by index.

A rule by arithmetic from the rates of a device (:mod:`.rates`): for n tokens, k channels, the other side ``length``, and
s matrices (two of the gated FFN, else one),

    ours      the longer of  2·s·n·k·length / rate  and  bytes / memory;  the first by whole tiles and whole rounds of them
              where the launchers' tables are at hand (``compute``, :mod:`.gpu.estimate`)
    vendor    the longer of  2·s·n·k·length / vendor  and  bytes / memory,  + copies / copy  + launches · launch

Bytes are what each must read and write once. Copies are what the vendor's form reads and writes besides: the rows of X, or
of the result, which the product leaves in a tensor of its own; the kept rows of W, or their decoded values; the result again
where a low-rank update is added to it; and gate and up again under the activation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .rates import DEFAULTS, key_of

NF4_BYTES = 0.5 + 4 / 64
"""Of a stored value: its code, and its part of an fp32 absmax."""


def prefers_vendor(
    product: str,
    n: int,
    k: int,
    length: int,
    dtype: torch.dtype,
    *,
    nf4: bool = False,
    copies_rows: bool = True,
    updates: bool = False,
    compute: float | None = None,
    rates: Mapping[str, float] = DEFAULTS,
) -> bool:
    """Whether the vendor's form of a product is the faster one.

    Args:
        product: one of ``rates.PRODUCTS``.
        nf4: how the matrix is stored.
        copies_rows: tokens are given by index; otherwise all are taken, and none is copied.
        updates: a low-rank update is added.
        compute: seconds that our product's programs take; by default its operations at its rate.
    """
    size = dtype.itemsize
    matrices = 2 if product in ("gated", "gradient") else 1
    operations = 2.0 * matrices * n * k * length
    wide = n * length * size
    narrow = n * k * size * (3 if product == "gated" else matrices)
    stored = matrices * k * length * (NF4_BYTES if nf4 else size)
    moved = (wide + narrow + stored) / rates["memory"]
    if compute is None:
        compute = operations / rates[key_of(product, dtype, nf4=nf4)]
    ours = max(compute, moved) + rates["launch"]
    copies = stored + matrices * k * length * size
    launches = 2 * matrices
    if copies_rows:
        copies += 2 * wide
        launches += 1
    if product == "gated":  # act(g) is written and read; so are u and h.
        copies += 5 * n * k * size
        launches += 2
    if updates:
        copies += 2 * (matrices * n * k * size if product in ("nt", "gated") else wide)
        launches += matrices
    vendor = max(operations / rates[key_of("vendor", dtype)], moved) + copies / rates["copy"]
    return ours > vendor + launches * rates["launch"]
