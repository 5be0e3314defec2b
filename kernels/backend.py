"""Which implementation an operation uses: Triton for CUDA tensors, torch otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_forced = False


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
