"""Reference of ``kernels/select.py``: a Python sort by (descending score, ascending index)."""

from __future__ import annotations

import torch
from torch import Tensor


def select_channels(scores: Tensor, keep: int) -> Tensor:
    """See :func:`sparselora_kernels.select_channels`."""
    values = scores.tolist()
    return torch.tensor(sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]), dtype=torch.int64)
