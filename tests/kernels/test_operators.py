"""The custom operators are registered as torch wants them: schema, fake tensors, no gradient; on both paths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from sparselora_dist.codecs import NF4Codec
from sparselora_kernels.backend import forced_triton
from sparselora_kernels.levels import BILLM, SIGNS
from support.kernel_cases import level_parts

PATHS = {"torch": nullcontext, "triton": forced_triton}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
Path = Callable[[], AbstractContextManager[None]]


def check(path: Path, operator: object, arguments: tuple) -> None:
    with path():
        torch.library.opcheck(operator, arguments)  # type: ignore[arg-type]


@paths
@pytest.mark.parametrize("count", [6, 0])
def test_scores(path: Path, count: int) -> None:
    x, rows = torch.randn(9, 7), torch.arange(count)
    gate, up = [(torch.randn(3, 7), torch.randn(5, 3)) for _ in range(2)]
    operators = torch.ops.sparselora
    check(path, operators.gated_ffn_score, (x, rows, *gate, *up, "silu"))
    check(path, operators.projection_scores, (x, rows, [gate[0], up[0]], [gate[1], up[1]]))


@paths
def test_select(path: Path) -> None:
    check(path, torch.ops.sparselora.select_channels, (torch.rand(40), 7))
    check(path, torch.ops.sparselora.select_channels, (torch.rand(4), 7))


@paths
def test_nf4(path: Path) -> None:
    parts = NF4Codec().encode(torch.randn(5, 100), 0)
    for channels in (None, torch.tensor([1, 3]), torch.empty(0, dtype=torch.int64)):
        arguments = (parts["codes"], parts["scales"], channels, torch.bfloat16, 100, True, 0)
        check(path, torch.ops.sparselora.nf4_rows, arguments)


@paths
@pytest.mark.parametrize(("rule", "bits"), [(SIGNS, 3), (BILLM, 2)], ids=["signs", "billm"])
def test_levels(path: Path, rule: int, bits: int) -> None:
    parts = level_parts((5, 100), rule, bits)
    for channels in (None, torch.tensor([1, 3]), torch.empty(0, dtype=torch.int64)):
        check(path, torch.ops.sparselora.level_rows, (*parts, channels, torch.bfloat16, 100, rule, bits))


def test_an_unknown_activation_is_refused() -> None:
    factors = torch.randn(3, 7), torch.randn(5, 3)
    with pytest.raises(ValueError, match="'swish'; known: silu"):
        torch.ops.sparselora.gated_ffn_score(torch.randn(9, 7), torch.arange(2), *factors, *factors, "swish")
