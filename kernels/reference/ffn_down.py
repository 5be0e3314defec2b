"""Reference of ``kernels/ffn_down.py``: the whole product, with the dropped neurons of context tokens set to zero."""

from __future__ import annotations

from torch import Tensor

from .gated_ffn import plain_linear


def ffn_down(
    h_dense: Tensor,
    h_context: Tensor,
    weight: Tensor,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    tokens: int,
    *,
    bias: Tensor | None = None,
    low_dense: Tensor | None = None,
    low_context: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.ffn_down`."""
    whole = h_context.new_zeros(h_context.shape[0], weight.shape[0]).index_copy(1, channels, h_context)
    y = h_context.new_zeros(tokens, weight.shape[1])
    y = y.index_put((dense_rows,), plain_linear(h_dense, weight.t(), bias, low_dense, b))
    return y.index_put((context_rows,), plain_linear(whole, weight.t(), bias, low_context, b))
