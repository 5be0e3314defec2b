"""Top-k in one launch of one program; contract in :mod:`sparselora_kernels.select`.

The scores' bits are mapped to unsigned integers of the same order, which stay in registers while a binary search over
their 32 bits finds the k-th largest. What is larger is kept, and of what is equal the first: two running counts over
blocks of indices give every kept index its place, so the result is ascending without a sort, and stable.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Variant

# (most channels, indices per step of the compaction, warps): at most 32 scores a thread. Longer steps, or fewer warps,
# spill under one supported Triton or another: 4096 on sm_90 and sm_100, 16384 on sm_80.
SIZES = ((1024, 1024, 4), (4096, 2048, 16), (16384, 2048, 32), (32768, 2048, 32))
LARGEST = SIZES[-1][0]


@triton.jit
def _keys(scores, i, n):
    """uint32 in the order of the scores; NaN is -inf, and -0 is 0; 0, below all of them, where there is no score."""
    x = tl.load(scores + i, mask=i < n, other=0.0)
    x = tl.where(x != x, float("-inf"), tl.where(x == 0.0, 0.0, x))
    bits = x.to(tl.uint32, bitcast=True)
    keys = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(i < n, keys, 0)


@triton.jit(do_not_specialize=["n", "keep"])
def select_kernel(
    scores,  # (n,) fp32
    out,  # (keep,) int64
    flag,  # (1,) fp32: 0, or 1 where a score is not finite
    n,
    keep,  # 1 ... n
    SIZE: tl.constexpr,  # At least n.
    BLOCK: tl.constexpr,
):
    keys = _keys(scores, tl.arange(0, SIZE), n)
    least = tl.zeros((), dtype=tl.uint32)  # The largest integer that at least `keep` keys reach.
    bit = tl.full((), 0x80000000, dtype=tl.uint32)
    for _ in range(32):
        candidate = least | bit
        reached = tl.sum((keys >= candidate).to(tl.int32), 0)
        least = tl.where(reached >= keep, candidate, least)
        bit = bit >> 1
    free = keep - tl.sum((keys > least).to(tl.int32), 0)  # Places for keys equal to it.
    # The keys of +inf, and of -inf and NaN; 0 is no score. Keys of finite scores are between them.
    not_finite = (keys >= 0xFF800000) | ((keys > 0) & (keys <= 0x007FFFFF))
    tl.store(flag, tl.max(not_finite.to(tl.int32), 0).to(tl.float32))
    kept = 0
    equal_before = 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        block = _keys(scores, i, n)
        equal = ((block == least) & (i < n)).to(tl.int32)
        take = (block > least) | ((equal != 0) & (equal_before + tl.cumsum(equal, 0) <= free))
        taken = take.to(tl.int32)
        place = kept + tl.cumsum(taken, 0) - 1
        tl.store(out + place, i.to(tl.int64), mask=take)
        kept += tl.sum(taken, 0)
        equal_before += tl.sum(equal, 0)


def variants() -> Iterator[Variant]:
    """One for each size."""
    for size, block, warps in SIZES:
        yield Variant(
            kernel=select_kernel,
            label=f"select {size}",
            signature={"scores": "*fp32", "out": "*i64", "flag": "*fp32", "n": "i32", "keep": "i32"},
            constants={"SIZE": size, "BLOCK": block},
            num_warps=warps,
            aligned=("scores", "out"),
        )


def select_channels(scores: Tensor, keep: int, flag: Tensor | None = None) -> Tensor:
    """See :func:`sparselora_kernels.select_channels`; at most :data:`LARGEST` scores, ``keep`` of them at most. Where
    some are kept, ``flag`` (1,) fp32 becomes 0, or 1 if a score is not finite."""
    n = scores.shape[0]
    flag = scores.new_empty(1, dtype=torch.float32) if flag is None else flag
    out = torch.empty(keep, dtype=torch.int64, device=scores.device)
    if keep:
        size, block, warps = next(sizes for sizes in SIZES if n <= sizes[0])
        scores = scores.float().contiguous()
        select_kernel[(1,)](scores, out, flag, n, keep, SIZE=size, BLOCK=block, num_warps=warps)
    return out
