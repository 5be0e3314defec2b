"""Every operation is registered with PyTorch: schema, fake results and autograd are checked, and torch.compile sees it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sparselora_kernels as kernels
import sparselora_kernels.flop_counts
from support.kernel_cases import nf4, some, split

OPS = torch.ops.sparselora


def lora_arguments(transposed: bool, rank: int, sparse: bool, quantised: bool) -> tuple:
    weight = torch.randn(12, 70)
    stored = nf4(weight)[0] if quantised else kernels.EncodedWeight((weight,))
    inputs, outputs = (12, 70) if transposed else (70, 12)
    x = torch.randn(9, inputs, requires_grad=True)
    a = torch.randn(rank, inputs, requires_grad=True) if rank else None
    b = torch.randn(outputs, rank, requires_grad=True) if rank else None
    lists = (*split(3, 4, 2), some(12, 5)) if sparse else (None, None, None)
    return x, list(stored.parts), list(stored.layout), torch.randn(outputs), a, b, 0.5, *lists, transposed, False


def gated_arguments(rank: int, dense: int) -> tuple:
    x = torch.randn(dense + 6, 5, requires_grad=True)
    updates: list[Any] = [None] * 4
    if rank:
        updates = [torch.randn(n, rank, requires_grad=True) for n in (dense + 6, 7, dense + 6, 7)]
    weights = [[torch.randn(7, 5)], [0], [torch.randn(7, 5)], [0]]
    return x, *weights, None, torch.randn(7), *updates, *split(dense, 4, 2), some(7, 3), "silu"


def halves_arguments() -> tuple:
    x, _, _, _, _, *rest = gated_arguments(2, 3)
    both = torch.randn(14, 5)
    return x, [both], [0, 0, 7], [both], [0, 7, 7], *rest


def down_arguments(rank: int) -> tuple:
    h = torch.randn(3, 7, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    updates = [torch.randn(n, rank, requires_grad=True) for n in (3, 4, 5)] if rank else [None] * 3
    return *h, [torch.randn(7, 5)], [0], torch.randn(5), *updates, *split(3, 4, 2), some(7, 2), 9


def up_arguments(rank: int, dense: int) -> tuple:
    x = torch.randn(dense + 6, 5, requires_grad=True)
    update = [torch.randn(n, rank, requires_grad=True) for n in (dense + 6, 7)] if rank else [None] * 2
    return x, [torch.randn(7, 5)], [0], torch.randn(7), *update, *split(dense, 4, 2), some(7, 3)


def joined_arguments(sparse: bool, quantised: bool, every: bool = False) -> tuple:
    x, outputs, ranks = torch.randn(9, 70, requires_grad=True), (12, 6, 6), (3, 2, 4)
    a = [torch.randn(rank, 70, requires_grad=True) for rank in ranks]
    b = [torch.randn(out, rank, requires_grad=True) for out, rank in zip(outputs, ranks)]
    weights = [kernels.EncodedWeight((torch.randn(out, 70),)) for out in outputs]
    weights[0] = nf4(weights[0].parts[0])[0] if quantised else weights[0]
    parts, layouts = [p for w in weights for p in w.parts], [n for w in weights for n in w.layout]
    third = some(6, 4) if every else None
    lists = (*split(3, 4, 2), [some(12, 5), some(6, 2), third]) if sparse else (None, None, [None] * 3)
    biases = [torch.randn(12), *([torch.randn(6), torch.randn(6)] if every else [None, None])]
    return x, *a, *b, parts, layouts, biases, [0.5, 1.0, 2.0], *lists


def grouped_arguments(transposed: bool, sparse: bool, quantised: bool) -> tuple:
    weight = torch.randn(3 * 6, 70)
    stored = nf4(weight)[0] if quantised else kernels.EncodedWeight((weight,))
    kept = torch.cat([expert * 6 + some(6, 4) for expert in range(3)]) if sparse else None
    x = torch.randn(9, (4 if sparse else 6) if transposed else 70, requires_grad=True)
    return x, list(stored.parts), list(stored.layout), torch.tensor([2, 2, 9], dtype=torch.int32), kept, transposed


def trained_bank() -> tuple:
    x, weight = torch.randn(9, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    return x, weight, torch.tensor([2, 2, 9], dtype=torch.int32)


def masked_arguments(form: int, sparse: bool = True, quantised: bool = False, straight: bool = False) -> tuple:
    weight = torch.randn(12, 70) * (torch.rand(12, 70) < 0.5)
    stored = nf4(weight)[0] if quantised else kernels.EncodedWeight((weight,))
    inputs, outputs = (12, 70) if form in (1, 3) else (70, 12)
    x, h = torch.randn(3 if form == 3 else 9, inputs, requires_grad=True), None
    if form == 3:
        h = torch.randn(4, 5, requires_grad=True)
    factors = torch.randn(2, inputs, requires_grad=True), torch.randn(outputs, 2, requires_grad=True)
    lists = (*split(3, 4, 2), some(12, 5)) if sparse else (None, None, None)
    parts = list(stored.parts), list(stored.layout)
    return x, h, *parts, torch.randn(outputs), *factors, 0.5, *lists, form, 9 if form == 3 else 0, straight


def frozen_branch(arguments: tuple) -> tuple:
    return *arguments[:4], arguments[4].detach(), arguments[5].detach(), *arguments[6:]


CASES: dict[str, tuple[str, Callable[[], tuple]]] = {
    "whole": ("lora_linear", lambda: lora_arguments(False, 3, False, False)),
    "q": ("lora_linear", lambda: lora_arguments(False, 3, True, False)),
    "o, NF4": ("lora_linear", lambda: lora_arguments(True, 3, True, True)),
    "frozen branch": ("lora_linear", lambda: frozen_branch(lora_arguments(False, 3, True, False))),
    "no branch": ("lora_linear", lambda: lora_arguments(True, 0, True, False)),
    "q, k and v": ("lora_joined", lambda: joined_arguments(False, False)),
    "q, k and v, some sparse": ("lora_joined", lambda: joined_arguments(True, True)),
    "q, k and v, all sparse": ("lora_joined", lambda: joined_arguments(True, False, True)),
    "through the weight": ("lora_linear", lambda: lora_arguments(False, 64, False, False)),
    "gate and up": ("gated_up", lambda: gated_arguments(0, 3)),
    "gate and up with LoRA": ("gated_up", lambda: gated_arguments(2, 3)),
    "gate and up, no dense token": ("gated_up", lambda: gated_arguments(2, 0)),
    "experts": ("grouped_linear", lambda: grouped_arguments(False, True, False)),
    "experts, down, NF4": ("grouped_linear", lambda: grouped_arguments(True, True, True)),
    "experts, whole": ("grouped_linear", lambda: grouped_arguments(False, False, True)),
    "experts, trained": ("grouped_product", trained_bank),
    "gate and up in one": ("gated_up", halves_arguments),
    "up": ("ffn_up", lambda: up_arguments(0, 3)),
    "up with LoRA": ("ffn_up", lambda: up_arguments(2, 3)),
    "up, no dense token": ("ffn_up", lambda: up_arguments(2, 0)),
    "down": ("ffn_down", lambda: down_arguments(0)),
    "down with LoRA": ("ffn_down", lambda: down_arguments(2)),
    "masked": ("masked_linear", lambda: masked_arguments(0, sparse=False)),
    "masked q, straight through": ("masked_linear", lambda: masked_arguments(0, straight=True)),
    "masked o, NF4": ("masked_linear", lambda: masked_arguments(1, quantised=True)),
    "masked up": ("masked_linear", lambda: masked_arguments(2)),
    "masked down": ("masked_linear", lambda: masked_arguments(3)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schema_fake_and_autograd(case: str) -> None:
    name, arguments = CASES[case]
    torch.library.opcheck(getattr(OPS, name), arguments())


def test_a_sparse_ffn_compiles_without_a_graph_break() -> None:
    gate, up, down = torch.randn(7, 5), torch.randn(7, 5), torch.randn(7, 5)
    rows, channels = split(3, 4, 2), some(7, 3)

    def ffn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = kernels.lora_linear(x, gate.new_ones(5, 5), None, a, b)
        hidden = kernels.gated_up(x, gate, up, *rows, channels)
        return kernels.ffn_down(*hidden, down, *rows, channels, 9)

    arguments = [torch.randn(9, 5), torch.randn(2, 5), torch.randn(5, 2)]
    found = []
    for function in (ffn, torch.compile(ffn, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in arguments]
        function(*leaves).square().sum().backward()
        found.append([t.grad for t in leaves])
    assert all(torch.allclose(a, b) for a, b in zip(*found))


class Inside(TorchDispatchMode):
    """Runs what an operation is made of where PyTorch's other modes see it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        definition = OPDEFS.get(func._schema.name)
        return func(*args, **(kwargs or {})) if definition is None else definition._init_fn(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_are_those_of_the_products_inside(case: str) -> None:
    """What FlopCounterMode is told of an operation, against the products of its implementation."""
    name, arguments = CASES[case]
    counts = []
    for mode in (nullcontext(), Inside()):
        torch.manual_seed(0)
        leaves = arguments()
        with FlopCounterMode(display=False) as counter, mode:
            outputs = getattr(OPS, name)(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(t.sum() for t in outputs if t.requires_grad).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
