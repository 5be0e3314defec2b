"""Which implementation an operation uses: Triton for CUDA tensors, torch otherwise; fp8 where the GPU multiplies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_forced = False
_forced_fp8 = False


def use_triton(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs its Triton kernels."""
    return x.is_cuda or _forced


@contextmanager
def forced_triton() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too: for tests, under ``TRITON_INTERPRET=1``. Of the whole process."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def use_fp8(x: Tensor) -> bool:
    """Whether the device of ``x`` multiplies fp8."""
    return _forced_fp8 or (x.is_cuda and _has_fp8(x.device))


@cache
def _has_fp8(device: torch.device) -> bool:
    # AMD's GPUs have had another fp8 than the one that is stored.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@contextmanager
def forced_fp8() -> Iterator[None]:
    """Multiply in fp8 on CPU tensors too, for tests. Of the whole process."""
    global _forced_fp8
    before, _forced_fp8 = _forced_fp8, True
    try:
        yield
    finally:
        _forced_fp8 = before
