"""Counting what a step would launch on a GPU, on a CPU: aten's operators and our Triton kernels, in the interpreter."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# Operators that start no kernel: another look at memory that is there, or memory alone.
_NOTHING = {
    *("_reshape_alias", "_unsafe_view", "alias", "detach", "expand", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    """``with Launches() as seen``: :attr:`names` counts operators that start a kernel, and Triton kernels, by name.

    A Triton kernel is one launch; what the interpreter makes of it is not counted. Backward and recomputation count too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self._inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not self._inside and name not in _NOTHING:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Launches:
        original = interpreter.GridExecutor.__call__

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.names[executor.fn.__name__] += 1
            before, self._inside = self._inside, True
            try:
                return original(executor, *args, **kwargs)
            finally:
                self._inside = before

        self._patch = mock.patch.object(interpreter.GridExecutor, "__call__", call)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._patch.stop()
