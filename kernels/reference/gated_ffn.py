"""Reference of ``kernels/gated_ffn.py``: the whole FFN, with the dropped neurons of context tokens set to zero."""

from __future__ import annotations

from torch import Tensor

from ..activations import activate


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, b: Tensor | None) -> Tensor:
    y = x @ weight.t()
    y = y if bias is None else y + bias
    return y if low is None or b is None else y + low @ b.t()


def gated_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    dense_rows: Tensor,
    context_rows: Tensor,
    channels: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_low: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_low: Tensor | None = None,
    up_b: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """See :func:`sparselora_kernels.gated_up`."""
    g, u = plain_linear(x, gate, gate_bias, gate_low, gate_b), plain_linear(x, up, up_bias, up_low, up_b)
    h = activate(activation, g) * u
    return h[dense_rows], h[context_rows][:, channels]
