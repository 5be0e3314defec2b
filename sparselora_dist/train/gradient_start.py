"""Where a masked adapter may begin: at the leading directions of the frozen matrix' gradient (LoRS, arXiv 2501.08582).

    A = the r leading right singular vectors of G, the mean gradient of the weight over the first training rows;   B = 0

``G`` is never made. An adapter beside ``W`` is a sketch of it: with ``B = 0`` the gradient of ``B`` is ``s·G·Aᵀ``, and with
``A = 0`` that of ``A`` is ``s·Bᵀ·G``; in both the model computes what it did. Two backward passes are thus a randomised
singular value decomposition (Halko, Martinsson, Tropp 2011) of all matrices at once, which the engine averages over ranks
and shards as it does with any gradient, and two more are a step of its subspace iteration. ``G`` is what the adapter sees of
it: without what is pruned where ``sparse_base.gradient`` is exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

import torch
from torch import Tensor

from .loop import TrainingLoop

log = logging.getLogger(__name__)
_ITERATIONS = 2


def start_at_gradient(loop: TrainingLoop, masked: Collection[str], rows: int) -> None:
    """Give the adapters of masked layers their start, before the first step. A collective.

    Args:
        loop: of a run that has not begun.
        masked: names of the layers, in the base model's files.
        rows: training rows for the gradient, in whole batches.

    Raises:
        ValueError: an adapter's rank is above a side of its matrix, which has no more directions.
        FloatingPointError: a gradient is not finite.
    """
    engine, context = loop.engine, loop.context
    values = engine.full_parameters()
    pairs = {a: a.replace(".lora_A.", ".lora_B.") for a in values if any(f"{name}.lora_A." in a for name in masked)}
    for a, b in sorted(pairs.items()):
        rank, side = values[a].shape[0], min(values[a].shape[1], values[b].shape[0])
        if rank > side:
            raise ValueError(
                f"sparse_base.start 'gradient': {a.split('.lora_A.')[0]} has rank {rank}, but its matrix only {side} "
                f"directions: give it at most that rank (lora.r, lora.rank_pattern), or set sparse_base.start to 'lora'"
            )
    generator = torch.Generator().manual_seed(loop.train.seed)
    for a in sorted(pairs):
        values[a] = torch.randn(values[a].shape, generator=generator)
    enabled, context.enabled = context.enabled, False  # Of the whole matrices.
    try:
        for _ in range(_ITERATIONS):
            for b in pairs.values():
                values[b] = torch.zeros_like(values[b])
            of_b = _gradients(loop, values, rows)
            for a, b in pairs.items():
                values[a], values[b] = torch.zeros_like(values[a]), torch.linalg.qr(of_b[b]).Q
            of_a = _gradients(loop, values, rows)
            for a, b in pairs.items():
                values[a] = torch.linalg.svd(of_a[a], full_matrices=False).Vh
                values[b] = torch.zeros_like(values[b])
    finally:
        context.enabled = enabled
    engine.load_state(values, {}, 0)
    if engine.is_main:
        log.info("%d adapters start at the gradient of %d rows", len(pairs), rows)


def _gradients(loop: TrainingLoop, values: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Mean gradients of the adapters where they are ``values``, whole, fp32, on every rank. No step is taken.

    Raises:
        FloatingPointError: they are not finite.
    """
    engine = loop.engine
    engine.load_state(values, {}, 0)
    total: dict[str, Tensor] = {}
    for number in range(math.ceil(rows / loop.sampler.global_batch_size)):
        batch = loop.feed.laid_out(loop.sampler.batch(number))
        labels = int(loop.train_data.label_counts[batch.indices].sum())
        if not labels:
            continue
        loop.forward_backward(0, batch, labels)
        for name, gradient in engine.full_gradients().items():
            total[name] = total[name] + gradient if name in total else gradient
        engine.clear_gradients()
    bad = [name for name, gradient in total.items() if not gradient.isfinite().all()]
    if bad or not total:
        what = f"the gradient of {bad[0]} is not finite" if bad else f"no label in the first {rows} training rows"
        raise FloatingPointError(f"sparse_base.start 'gradient': {what}. Set it to 'lora', or look at the data")
    return total
