"""LM head and cross-entropy of label positions in chunks of rows, with at most one chunk of logits alive.

    z = h Wᵀ + b,    loss = Σ_i [ log Σ_v exp(z_iv) - z_i,label_i ],    dh = (softmax(z) - onehot(label)) W

``h`` (n, H), ``W`` (V, H), frozen; logits in the dtype of ``h`` and ``W``, everything from there to the gradient of the
logits in fp32. The whole of them would be 12 bytes a label and word, 3.2 GB at 2048 labels and 128,256 words. Here the
gradient of ``h`` is made in the forward, chunk by chunk, while the logits are there; backward multiplies it by the loss's
own, and needs neither logits nor ``W``, which a sharding engine then has not to gather again. The products are those of
the whole head: nothing is computed twice.

Plain PyTorch on every device: both products are the vendor's, and what is between them is elementwise or a row's sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Of the logits that are alive at once. At 128,256 words 320 rows in bf16: enough for a product that is not bound by
reading ``W``, and far below what a decoder layer keeps."""
_TILE = 64


def chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Label rows of a chunk: a multiple of 64 where there are as many.

    Args:
        vocabulary: V.
        dtype: of the logits; where it is not fp32, they and their fp32 copy are alive together.
    """
    rows = max(1, CHUNK_BYTES // (vocabulary * row_bytes(dtype)))
    return rows // _TILE * _TILE or rows


def row_bytes(dtype: torch.dtype) -> int:
    """Bytes that a chunk holds for each of its logits."""
    return 4 if dtype == torch.float32 else 4 + dtype.itemsize


def label_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Sum of the cross entropies, () fp32; differentiable with respect to ``hidden``.

    Args:
        hidden: (n, H); n may be zero.
        weight: (V, H) in the dtype of ``hidden``; it gets no gradient.
        bias: (V,), or ``None``; it gets none either.
        labels: (n,) int64 in [0, V).
        scale, cap: the logits are ``scale * z``, or ``cap * tanh(scale * z / cap)``.
    """
    return _LabelLoss.apply(hidden, weight, bias, labels, scale, cap)


@torch.no_grad()
def label_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """(n, 2) fp32: each label's cross entropy, and 1 where it is the most likely word, else 0. Carries no gradient."""
    with torch.autocast(hidden.device.type, enabled=False):
        found = [
            scores_of(_logits(hidden[rows], weight, bias, scale, cap), labels[rows]) for rows in _chunks(hidden, weight)
        ]
    return torch.cat(found) if found else hidden.new_zeros((0, 2), dtype=torch.float32)


@torch.no_grad()
def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`label_scores` of logits (n, V) that are there already; fp32 ones are written over."""
    logits, wanted = logits.float(), labels[:, None]
    best = logits.argmax(1, keepdim=True)
    right = (best == wanted).float()
    loss, _ = _softmax(logits, logits.gather(1, best), wanted)
    return torch.cat([loss, right], 1)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = chunk_rows(weight.shape[0], hidden.dtype)
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _softmax(logits: Tensor, largest: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy (m, 1) and softmax (m, V), in the memory of ``logits`` (m, V) fp32."""
    target = logits.gather(1, wanted) - largest
    shares = logits.sub_(largest).exp_()
    total = shares.sum(1, keepdim=True)
    return total.log() - target, shares.div_(total)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """(m, V) fp32, scaled and capped in place."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    factor = scale if cap is None else scale / cap
    if factor != 1.0:
        logits.mul_(factor)
    return logits if cap is None else logits.tanh_().mul_(cap)


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Loss of one chunk; its gradient is written into ``grad``. Nothing of the chunk outlives the call."""
    logits = _logits(hidden, weight, bias, scale, cap)
    wanted = labels[:, None]
    slope = None if cap is None or grad is None else (logits / cap).square_().neg_().add_(1.0)
    loss, shares = _softmax(logits, logits.amax(1, keepdim=True), wanted)
    if grad is not None:
        shares.scatter_(1, wanted, shares.gather(1, wanted) - 1.0)
        if slope is not None:
            shares.mul_(slope)
        if scale != 1.0:
            shares.mul_(scale)
        torch.mm(shares.to(weight.dtype), weight, out=grad)
    return loss.sum()


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                into = None if grad is None else grad[rows]
                total += _chunk_loss(hidden[rows], weight, bias, labels[rows], into, scale, cap)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_grad: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * loss_grad, None, None, None, None, None
