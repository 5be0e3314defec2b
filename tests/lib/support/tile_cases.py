"""What the tests of the indexed Triton kernels share: matrices, and cases that launch one tile of a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_kernels import nf4_rows
from sparselora_kernels.gpu.matrix import NF4Matrix
from sparselora_kernels.reference.nf4 import LEVELS

from .compare import assert_close

weights = pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
# One rounding of the exact result, and the error of fp32 sums of about one.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.bfloat16: (2**-8, 1e-5)}


def close(name: str, expected: Tensor, got: Tensor) -> None:
    rtol, atol = TOLERANCE[got.dtype]
    assert_close(name, expected, got, rtol=rtol, atol=atol)


def matrix(channels: int, width: int, index: Tensor, dtype: torch.dtype, nf4: bool) -> tuple[Any, Tensor]:
    """A stored matrix as the kernels take it for the rows ``index``, and these rows decoded, in fp64."""
    if not nf4:
        weight = torch.randn(channels, width).to(dtype)
        return weight, weight[index].double()
    blocks = -(-width // 64)
    codes = torch.randint(0, 256, (channels, 32 * blocks), dtype=torch.uint8)
    absmax = torch.rand(channels, blocks) + 0.5
    decoded = nf4_rows(codes, absmax.view(torch.uint8), index, dtype, length=width, double_quant=False)
    return NF4Matrix(codes, absmax[index], torch.tensor(LEVELS), width), decoded.double()


def tiles(tables: dict[str, tuple]) -> list:
    """A parameter set (kind, place) for every tile of a table."""
    return [
        pytest.param(kind, place, id=f"{kind} {tile.m}x{tile.n}x{tile.k}")
        for kind, table in tables.items()
        for place, tile in enumerate(table)
    ]


def only(monkeypatch: pytest.MonkeyPatch, tables: dict[str, tuple], kind: str, place: int) -> tuple[torch.dtype, bool]:
    """Leave one tile to choose; the dtype that it is for, and whether for NF4."""
    tile = tables[kind][place]
    for name in tables:
        monkeypatch.setitem(tables, name, (tile,) if name == kind else ())
    return torch.bfloat16 if kind.startswith("16") else torch.float32, "nf4" in kind
