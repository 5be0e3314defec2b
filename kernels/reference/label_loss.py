"""Reference of ``kernels/label_loss.py``: all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def label_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.label_loss`."""
    return cross_entropy(_logits(hidden, weight, bias, scale, cap), labels, reduction="sum")


def label_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.label_scores`."""
    logits = _logits(hidden, weight, bias, scale, cap)
    losses = cross_entropy(logits, labels, reduction="none")
    return torch.stack([losses, (logits.argmax(1) == labels).float()], 1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    logits = scale * linear(hidden, weight, bias).float()
    return logits if cap is None else cap * torch.tanh(logits / cap)
