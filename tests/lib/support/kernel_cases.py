"""Shapes and helpers that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_dist.codecs import FloatsCodec
from sparselora_dist.codecs.nf4 import NF4Codec
from sparselora_kernels import EncodedWeight
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.floats import E4M3, E4M3_OVER, E8M0, FP32
from sparselora_kernels.levels import BILLM, BITS, groups, numbers, pack_params, widths
from sparselora_kernels.stored import unpack

from .compare import TOLERANCE, assert_close

implementations = pytest.mark.parametrize("implementation", ["torch", "triton"])
"""The CPU path, and the Triton kernels in their interpreter."""


@contextmanager
def running(implementation: str) -> Iterator[None]:
    with forced_triton() if implementation == "triton" else nullcontext():
        yield


def split(dense: int, context: int, padding: int) -> tuple[Tensor, Tensor]:
    """Random disjoint ascending rows of ``dense + context + padding`` tokens."""
    order = torch.randperm(dense + context + padding)
    return order[:dense].sort().values, order[dense : dense + context].sort().values


def some(channels: int, kept: int) -> Tensor:
    """``kept`` random ascending channels."""
    return torch.randperm(channels)[:kept].sort().values


def pruned(shape: tuple[int, int]) -> Tensor:
    """A random matrix with half of its values zero, but not all."""
    weight = torch.randn(shape)
    weight[torch.rand(shape) < 0.5] = 0
    weight[-1, -1] = 0.7
    return weight


def nf4(weight: Tensor, double_quant: bool = True) -> tuple[EncodedWeight, Tensor]:
    """A matrix (C, length) in NF4, and the values that it then has, in fp32."""
    codec = NF4Codec(double_quant=double_quant)
    encoded = codec.encode(weight, 0)
    stored = unpack(codec.stored(tuple(encoded.values()), weight.shape[1]))
    return stored, stored.decode(None, torch.float32)


LEVEL_RULES = [(rule, bits) for rule, allowed in BITS.items() for bits in allowed]
"""``(rule, bits)`` of :mod:`sparselora_kernels.levels`."""


def level_parts(shape: tuple[int, int], rule: int, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, numbers and columns at random; among the numbers zeros, subnormal ones and the largest."""
    rows, length = shape
    params = torch.randn(rows, groups(length), numbers(rule, bits)) * 0.02
    params.view(-1)[::5] = torch.tensor([0.0, -0.0, 6e-8, -5e-5, 65504.0])[torch.randint(5, params.view(-1)[::5].shape)]
    codes, columns = (torch.randint(256, (n, widths(length, rule, bits)[at]), dtype=torch.uint8)
                      for n, at in ((rows, 0), (1, -1)))  # fmt: skip
    return codes, pack_params(params), columns if rule == BILLM else None


def nf4_parts(shape: tuple[int, int], double_quant: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a random matrix."""
    encoded = NF4Codec(double_quant=double_quant).encode(torch.randn(shape) * 0.02, 0)
    return encoded["codes"], encoded["scales"]


FLOAT_FORMATS = [
    (8, FP32, 0, 1), (8, FP32, 0, 0), (8, FP32, 1, 0), (8, FP32, 128, 128), (8, FP32, 16, 3),
    (4, E4M3, 16, 1), (4, E4M3, 1, 16), (4, E8M0, 32, 1), (4, E8M0, 1, 32), (4, E8M0, 7, 2),
    (4, E4M3_OVER, 16, 1), (4, E4M3_OVER, 1, 16), (8, E8M0, 32, 1),
]  # fmt: skip
"""(bits, kind of scale, block, every): what files hold, and blocks that nothing divides."""


def floats(shape: tuple[int, int], bits: int, scale: int, block: int, every: int) -> EncodedWeight:
    """A random matrix of fp8 or fp4 codes with random scales, none of them NaN."""
    codec = FloatsCodec(bits, scale, block, every)
    parts = []
    for name, part in codec.parts(shape[1]).items():
        size = (part.rows(shape[0]), part.width)
        if name == "rows":
            rows = torch.randint(0, 256, size, dtype=torch.uint8)
            parts.append(rows.masked_fill_(rows & 127 == 127, 3) if bits == 8 else rows)
        elif name == "whole" or scale == FP32:
            parts.append(torch.randn(size[0], size[1] // 4).view(torch.uint8))
        else:
            # Powers of two near 1; any positive e4m3, those below 2^-6 among them.
            parts.append(torch.randint(*((100, 150) if scale == E8M0 else (0, 127)), size, dtype=torch.uint8))
    return unpack(codec.stored(tuple(parts), shape[1]))


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone().requires_grad_()


def wide(value: Any) -> Any:
    """Floating-point tensors in fp64, for the reference."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def results(operation: Callable[..., Any], trained: dict[str, Tensor | None], **fixed: Any) -> dict[str, Tensor]:
    """Outputs of ``operation(**trained, **fixed)`` and the gradients of what is trained, for fixed output gradients."""
    leaves = {name: leaf(tensor) for name, tensor in trained.items()}
    outputs = operation(**leaves, **fixed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    found = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    return found | {f"grad {name}": tensor.grad for name, tensor in leaves.items() if tensor is not None}


def compare(expected: dict[str, Tensor], got: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every result of ``dtype`` and close: relative, and to the largest value where terms cancel."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == dtype, name
        scale = max(float(value.abs().max()), 1.0) if value.numel() else 1.0
        assert_close(name, value, got[name], atol=TOLERANCE[dtype][1] * scale)


# --- the sparse FFN

# (dense, context, padding tokens, hidden, neurons, kept)
FFN_SHAPES = [(3, 5, 2, 3, 7, 4), (1, 1, 0, 1, 1, 1), (4, 9, 3, 5, 13, 1), (4, 9, 0, 5, 13, 13)]
FFN_NO_TOKENS = [(4, 0, 1, 5, 7, 3), (0, 4, 1, 5, 7, 3), (0, 0, 3, 5, 7, 3)]
ranks = pytest.mark.parametrize("rank", [0, 3])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
shapes = pytest.mark.parametrize("shape", FFN_SHAPES + FFN_NO_TOKENS, ids=str)


def ffn_lists(shape: tuple) -> dict[str, Tensor]:
    dense_rows, context_rows = split(*shape[:3])
    return {"dense_rows": dense_rows, "context_rows": context_rows, "channels": some(shape[4], shape[5])}
