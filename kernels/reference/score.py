"""Reference of ``kernels/score.py``: the definition, with the tokens × channels tensor written out, in fp64."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _estimate(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x[rows].double() @ a.double().t() @ b.double().t()


def projection_score(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See :func:`sparselora_kernels.projection_score`."""
    return _estimate(x, rows, a, b).square().sum(0).float()


def gated_ffn_score(
    x: Tensor,
    rows: Tensor,
    gate: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """See :func:`sparselora_kernels.gated_ffn_score`."""
    return (activation(_estimate(x, rows, *gate)) * _estimate(x, rows, *up)).square().sum(0).float()


def ffn_score(
    x: Tensor,
    rows: Tensor,
    up: tuple[Tensor, Tensor],
    activation: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """See :func:`sparselora_kernels.ffn_score`."""
    y = _estimate(x, rows, *up)
    return activation(y if bias is None else y + bias.double()).square().sum(0).float()
