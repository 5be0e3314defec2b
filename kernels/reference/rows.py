"""Reference of ``kernels/rows.py``: plain indexing."""

from __future__ import annotations

from torch import Tensor


def split_rows(x: Tensor, dense_rows: Tensor, context_rows: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparselora_kernels.split_rows`."""
    return x[dense_rows], x[context_rows]


def join_rows(dense: Tensor, context: Tensor, dense_rows: Tensor, context_rows: Tensor, tokens: int) -> Tensor:
    """See :func:`sparselora_kernels.join_rows`."""
    y = dense.new_zeros(tokens, dense.shape[1])
    return y.index_put((dense_rows,), dense).index_put((context_rows,), context)
