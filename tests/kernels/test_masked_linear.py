"""Products with a masked adapter's weight: outputs and gradients are those of autograd on ``linear(x, (W + sBA) ⊙ M)``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparselora_kernels as kernels
from sparselora_kernels import reference
from support.kernel_cases import compare, implementations, nf4, pruned, results, running, some, split, wide

# (dense, context, padding tokens, channels, width, kept)
SHAPES = [(3, 5, 2, 7, 3, 4), (1, 1, 0, 1, 1, 1), (4, 9, 3, 13, 5, 1), (4, 9, 0, 13, 5, 13), (0, 4, 1, 7, 5, 3)]
SHAPES += [(4, 0, 1, 7, 5, 3), (0, 0, 3, 7, 5, 3), (0, 0, 0, 7, 5, 3)]
FORMS = ["outputs", "inputs", "up", "down"]
"""q, k, v; o; gate and up; down."""
COMPUTED = [(torch.float64, "torch"), (torch.float32, "torch"), (torch.bfloat16, "torch")]
COMPUTED += [(torch.float32, "triton"), (torch.bfloat16, "triton")]
forms = pytest.mark.parametrize("form", FORMS)
gradients = pytest.mark.parametrize("gradient", ["exact", "straight_through"])
RANK, SCALING = 3, 1.7
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def case(shape: tuple, form: str, dtype: torch.dtype = torch.float32, *, lists: bool = True) -> tuple[dict, dict]:
    """(trained, fixed) arguments."""
    dense, context, padding, channels, width, kept = shape
    tokens, turned = dense + context + padding, form in ("inputs", "down")
    inputs, outputs = (channels, width) if turned else (width, channels)
    rows = split(dense, context, padding)
    chosen = some(channels, kept)
    trained = {"x": torch.randn(tokens, inputs, dtype=dtype)}
    if form == "down":
        hidden = torch.randn(dense, inputs, dtype=dtype), torch.randn(context, kept, dtype=dtype)
        trained = dict(zip(("h_dense", "h_context"), hidden))
    trained |= {"a": torch.randn(RANK, inputs, dtype=dtype), "b": torch.randn(outputs, RANK, dtype=dtype)}
    fixed: dict[str, Any] = {
        "weight": pruned((channels, width)).to(dtype),
        "bias": torch.randn(outputs, dtype=dtype),
        "scaling": SCALING,
    }
    if lists:
        fixed |= {"dense_rows": rows[0], "context_rows": rows[1], "channels": chosen}
    if form == "down":
        fixed["tokens"] = tokens
    elif form in ("outputs", "inputs"):
        fixed["transposed"] = turned
    return trained, fixed


def call(module: Any, form: str) -> Any:
    """The operation of a form, by keywords; the references of up and down take their lists by position."""
    operation = {"up": module.masked_up, "down": module.masked_down}.get(form, module.masked_linear)
    names = ["dense_rows", "context_rows", "channels", *(["tokens"] if form == "down" else [])]

    def run(*, scaling: float, weight: Any, a: Tensor, b: Tensor, **others: Any) -> Tensor:
        if form not in ("up", "down"):
            return operation(weight=weight, a=a, b=b, scaling=scaling, **others)
        tokens = [others.pop(name) for name in ("x", "h_dense", "h_context") if name in others]
        return operation(*tokens, weight, a, b, scaling, *(others.pop(name) for name in names), **others)

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@forms
@pytest.mark.parametrize("dtype, implementation", COMPUTED, ids=str)
@gradients
def test_equals_autograd_of_the_formula(
    shape: tuple, form: str, dtype: torch.dtype, gradient: str, implementation: str
) -> None:
    trained, fixed = case(shape, form, dtype)
    with running(implementation):
        got = results(call(kernels, form), trained, gradient=gradient, **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    expected = results(call(reference, form), double[0], gradient=gradient, **double[1])
    compare(expected, got, dtype)
    for name, value in expected.items():
        assert value.numel() == 0 or (got[name] - value).abs().max() <= LIMIT[dtype] * max(1, value.abs().max()), name


@pytest.mark.parametrize("form", ["outputs", "inputs"])
@gradients
@pytest.mark.parametrize("tokens", [12, 0])
@implementations
def test_all_tokens_whole(form: str, gradient: str, tokens: int, implementation: str) -> None:
    trained, fixed = case((tokens, 0, 0, 13, 5, 6), form, lists=False)
    with running(implementation):
        got = results(call(kernels, form), trained, gradient=gradient, **fixed)
    compare(results(call(reference, form), trained, gradient=gradient, **fixed), got)


@forms
@gradients
@pytest.mark.parametrize("dense", [0, 3])
@implementations
def test_nf4_equals_the_decoded_weight(form: str, gradient: str, dense: int, implementation: str) -> None:
    trained, fixed = case((dense, 6, 1, 20, 70, 7), form)
    stored, values = nf4(fixed.pop("weight"))
    with running(implementation):
        got = results(call(kernels, form), trained, weight=stored, gradient=gradient, **fixed)
    compare(results(call(reference, form), trained, weight=values, gradient=gradient, **fixed), got)


@forms
def test_without_zeros_it_is_plain_lora(form: str) -> None:
    trained, fixed = case((4, 9, 0, 13, 5, 13), form)
    fixed["weight"] = fixed["weight"] + (fixed["weight"] == 0)
    got = results(call(kernels, form), trained, **fixed)
    straight = results(call(kernels, form), trained, gradient="straight_through", **fixed)
    plain = results(call(reference, form), trained, **fixed)
    compare(plain, got)
    compare(plain, straight)
    if form in ("outputs", "inputs"):  # All channels are kept: the branch is whole.
        compare(results(kernels.lora_linear, trained, **fixed), got)


def test_straight_through_is_the_published_formula_with_s() -> None:
    """LoRS: dB = s·dYᵀ(X·Aᵀ), dA = s·(dY·B)ᵀX."""
    trained, fixed = case((9, 0, 0, 13, 5, 6), "outputs", torch.float64, lists=False)
    grad = torch.linspace(-1, 1, 9 * 13, dtype=torch.float64).view(9, 13)
    got = results(call(kernels, "outputs"), trained, gradient="straight_through", **fixed)
    x, a, b = (trained[name] for name in ("x", "a", "b"))
    torch.testing.assert_close(got["grad b"], SCALING * grad.t() @ (x @ a.t()))
    torch.testing.assert_close(got["grad a"], SCALING * (grad @ b).t() @ x)
    exact = results(call(kernels, "outputs"), trained, gradient="exact", **fixed)
    assert torch.equal(exact["grad x"], got["grad x"]), "that of the input is exact in both"
    assert not torch.allclose(exact["grad a"], got["grad a"], rtol=0.1)


@pytest.mark.parametrize("rank, order", [(3, "through_rank"), (40, "through_weight")])
def test_straight_through_takes_the_cheaper_order(rank: int, order: str) -> None:
    assert kernels.lora_order(200, 9, 13, rank)[1] == order
    trained, fixed = case((200, 0, 0, 13, 9, 1), "outputs", lists=False)
    trained |= {"a": torch.randn(rank, 9) / 3, "b": torch.randn(13, rank) / 3}
    got = results(call(kernels, "outputs"), trained, gradient="straight_through", **fixed)
    double = {k: wide(v) for k, v in trained.items()}, {k: wide(v) for k, v in fixed.items()}
    compare(results(call(reference, "outputs"), double[0], gradient="straight_through", **double[1]), got)


@forms
@gradients
def test_autograd_keeps_the_input_and_the_factors_and_no_matrix(form: str, gradient: str) -> None:
    trained, fixed = case((8, 16, 0, 96, 64, 24), form)
    kept: list[Tensor] = []
    leaves = {name: tensor.requires_grad_() for name, tensor in trained.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call(kernels, form)(**leaves, gradient=gradient, **fixed)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in leaves.values()}
    reached = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    given = {t.data_ptr() for t in fixed.values() if isinstance(t, Tensor)}
    assert {t.data_ptr() for t in reached} <= given, "the stored matrix and the lists themselves"


@forms
@implementations
def test_runs_are_bit_identical(form: str, implementation: str) -> None:
    trained, fixed = case((4, 9, 2, 37, 21, 11), form, torch.bfloat16)
    with running(implementation):
        first, second = (results(call(kernels, form), trained, **fixed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_it_refuses() -> None:
    x, a, b = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
    with pytest.raises(ValueError, match="freeze the weight"):
        kernels.masked_linear(x, torch.ones(4, 3, requires_grad=True), a, b)
    with pytest.raises(ValueError, match="all three index lists"):
        kernels.masked_linear(x, torch.ones(4, 3), a, b, channels=torch.tensor([0]))
