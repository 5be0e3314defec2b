"""Seeing, on a CPU, what would make the host wait for a GPU; and what is made on the way."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparselora_dist
import sparselora_kernels

OURS = tuple(str(Path(str(package.__file__)).parent) for package in (sparselora_dist, sparselora_kernels))
# Operators whose result, or its shape, the host needs to know.
_OPERATORS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Python's ways to a tensor's values, and from the host to a tensor: torch.tensor(list, device="cuda") waits too.
_PYTHON: tuple[tuple[Any, str], ...] = (
    (Tensor, "cpu"),
    (Tensor, "numpy"),
    (Tensor, "tolist"),
    (Tensor, "__array__"),
    (torch, "as_tensor"),
    (torch, "from_numpy"),
    (torch, "tensor"),
)


def _asked_by_us() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _waits(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = function.overloadpacket.__name__
    if name in _INDEXING:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] or ())
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[0] if len(args) == 1 else args[1], Tensor)
    return name in _OPERATORS


class Waits:
    """``with Waits() as waits``: :attr:`all` counts what waits by name, :attr:`ours` what our code asked for."""

    def __init__(self) -> None:
        self.all: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()
        self._stack = ExitStack()

    def note(self, name: str) -> None:
        self.all[name] += 1
        if _asked_by_us():
            self.ours[name] += 1

    def _noting(self, name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            # On a CPU every device is "cpu": only a device by name tells that the host is meant.
            if name != "to" or "cpu" in [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]:
                self.note(name)
            return original(*args, **kwargs)

        return call

    def __enter__(self) -> Waits:
        # Patched, because backward runs without a mode for Python functions.
        for owner, name in (*_PYTHON, (Tensor, "to")):
            self._stack.enter_context(mock.patch.object(owner, name, self._noting(name, getattr(owner, name))))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(function, args, kwargs or {}):
            self.waits.note(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor that any operator returns while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.is_floating_point():
                self.elements = max(self.elements, made.numel())
        return result
