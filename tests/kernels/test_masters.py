"""fp32 masters beside bf16 products: the same numbers as factors that were cast before, gradients in the masters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels.masters import cast, stack
from support.kernel_cases import implementations, running, some

OUTPUTS, RANKS, INPUTS, TOKENS = (24, 8, 16), (3, 2, 4), 32, 11


def masters() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return (
        [torch.randn(r, INPUTS, requires_grad=True) for r in RANKS],
        [torch.randn(out, r, requires_grad=True) for out, r in zip(OUTPUTS, RANKS)],
    )


def joined(x: Tensor, a: list[Tensor], b: list[Tensor], **lists: Any) -> Tensor:
    weights = [torch.randn(out, INPUTS, generator=torch.Generator().manual_seed(out)).bfloat16() for out in OUTPUTS]
    return torch.cat(kernels.lora_joined(x, weights, [None] * 3, a, b, (2.0, 1.0, 0.5), **lists), 1)


def one(x: Tensor, a: list[Tensor], b: list[Tensor], **lists: Any) -> Tensor:
    weight = torch.randn(OUTPUTS[0], INPUTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    lists |= {"channels": lists["channels"][0]} if lists else {}
    return kernels.lora_linear(x, weight, None, a[0], b[0], 2.0, **lists)


@pytest.mark.parametrize("sparse", [False, True], ids=["whole", "chosen"])
@pytest.mark.parametrize("operation", [one, joined])
@implementations
def test_as_if_they_had_been_cast(operation: Callable[..., Tensor], sparse: bool, implementation: str) -> None:
    lists: dict[str, Any] = {}
    if sparse:
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
        lists = {"dense_rows": order[:4].sort().values, "context_rows": order[4:].sort().values}
        lists["channels"] = [some(24, 7), some(8, 3), None]
    found = []
    for outside in (False, True):
        x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        a, b = masters()
        given = [[f.bfloat16() for f in factors] for factors in (a, b)] if outside else [a, b]
        with running(implementation):
            y = operation(x, *given, **lists)
            y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(f.grad for f in (*a, *b))])
    for mine, theirs in zip(*found):
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    assert sum(grad is not None and grad.dtype == torch.float32 for grad in found[0][2:]) == (
        2 if operation is one else 6
    )


def test_one_buffer_and_no_copy_where_none_is_needed() -> None:
    a, _ = masters()
    assert all(mine is master for mine, master in zip(cast(a, torch.float32), a))
    narrow = cast(a, torch.bfloat16)
    assert len({part.untyped_storage().data_ptr() for part in narrow}) == 1
    assert all(torch.equal(part, master.bfloat16()) and not part.requires_grad for part, master in zip(narrow, a))
    assert torch.equal(stack(a, torch.bfloat16), torch.cat(narrow)) and torch.equal(
        stack(a, torch.float32), torch.cat(a)
    )
