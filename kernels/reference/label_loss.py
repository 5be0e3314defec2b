"""Reference of ``kernels/label_loss.py``: all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def label_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.label_loss`."""
    return cross_entropy(linear(hidden, weight, bias).float(), labels, reduction="sum")


def label_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.label_scores`."""
    logits = linear(hidden, weight, bias).float()
    losses = cross_entropy(logits, labels, reduction="none")
    return torch.stack([losses, (logits.argmax(1) == labels).float()], 1)
