"""Reference of ``kernels/lora_joined.py``: one after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .lora_linear import lora_linear


def lora_joined(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    dense_rows: Tensor | None = None,
    context_rows: Tensor | None = None,
    channels: Sequence[Tensor | None] = (None,) * 3,
) -> tuple[Tensor, ...]:
    """See :func:`sparselora_kernels.lora_joined`."""
    outputs = []
    for *matrix, kept in zip(weights, biases, a, b, scalings, channels):
        rows = (None, None) if kept is None else (dense_rows, context_rows)
        outputs.append(lora_linear(x, *matrix, dense_rows=rows[0], context_rows=rows[1], channels=kept))
    return tuple(outputs)
