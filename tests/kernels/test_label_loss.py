"""LM head and cross-entropy in chunks: the loss and gradient of the whole, and the memory of one chunk."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_kernels import chunk_rows, label_loss, label_scores, reference, row_bytes
from support.compare import assert_close
from support.peak import peak_bytes

module: Any = import_module("sparselora_kernels.label_loss")  # The package has a function of this name.
WORDS, HIDDEN = 203, 24
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def made(n: int, dtype: torch.dtype = torch.float32, bias: bool = False, scale: float = 1.0) -> tuple:
    generator = torch.Generator().manual_seed(n)
    hidden = scale * torch.randn(n, HIDDEN, generator=generator)
    weight, b = torch.randn(WORDS, HIDDEN, generator=generator), torch.randn(WORDS, generator=generator)
    labels = torch.randint(WORDS, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), b.to(dtype) if bias else None, labels


@pytest.fixture(params=[1, 7, 64, 10**6], ids=lambda rows: f"chunks of {rows}")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary, dtype: request.param)
    return request.param


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("n", [1, 63, 64, 130])
def test_loss_and_gradient(rows: int, n: int, bias: bool, dtype: torch.dtype) -> None:
    results: list[tuple[Tensor, Tensor]] = []
    for function in (reference.label_loss, label_loss):
        hidden, *rest = made(n, dtype, bias)
        loss = function(hidden, *rest)
        (loss / 37.0).backward()
        results.append((loss, hidden.grad))
    (loss, grad), (got, mine) = results
    assert got.dtype == torch.float32 and mine.dtype == dtype
    # Sums of fp32 in another order. In bf16 the gradient is scaled after it was rounded, and not before.
    assert_close("loss", loss, got, rtol=1e-6, atol=0.0)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert_close("gradient", grad, mine, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


def test_large_logits_do_not_overflow(rows: int) -> None:
    hidden, *rest = made(40, scale=100.0)
    assert_close("loss", reference.label_loss(hidden, *rest), label_loss(hidden, *rest), rtol=1e-6, atol=0.0)


@dtypes
@pytest.mark.parametrize("n", [0, 1, 130])
def test_scores(rows: int, n: int, dtype: torch.dtype) -> None:
    arguments = made(n, dtype, bias=True)
    got = label_scores(*arguments)
    assert got.shape == (n, 2) and not got.requires_grad
    expected = reference.label_scores(*arguments)
    assert_close("losses", expected[:, 0], got[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(expected[:, 1], got[:, 1])


def test_some_are_right(rows: int) -> None:
    hidden, weight, bias, _ = made(50)
    best = (hidden @ weight.t()).argmax(1)
    labels = torch.where(torch.arange(50) % 3 == 0, best, (best + 1) % WORDS)
    assert label_scores(hidden, weight, bias, labels)[:, 1].tolist() == [float(i % 3 == 0) for i in range(50)]


def test_no_label_gives_zero_and_a_gradient(rows: int) -> None:
    hidden, *rest = made(0)
    loss = label_loss(hidden, *rest)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad.shape == (0, HIDDEN)


def test_without_gradients_none_is_computed() -> None:
    hidden, *rest = made(70)
    with torch.no_grad():
        loss = label_loss(hidden, *rest)
    assert_close("loss", label_loss(hidden, *rest), loss, rtol=0.0, atol=0.0)
    assert not loss.requires_grad


def test_a_chunk_is_as_large_as_it_may_be() -> None:
    for vocabulary in (96, 32_000, 128_256, 256_000):
        for dtype in (torch.float32, torch.bfloat16):
            found = chunk_rows(vocabulary, dtype)
            assert found % 64 == 0
            assert found * vocabulary * row_bytes(dtype) <= module.CHUNK_BYTES
            assert (found + 64) * vocabulary * row_bytes(dtype) > module.CHUNK_BYTES
    assert chunk_rows(10**8, torch.float32) == 1


@dtypes
@pytest.mark.parametrize("what", ["loss", "scores"])
def test_one_chunk_of_logits_is_alive(what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it: the gradient of the hidden states, and a few numbers a label."""
    n, words = 640, 4096
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 * words * row_bytes(dtype))
    hidden = torch.randn(n, 16, dtype=dtype).requires_grad_()
    weight, labels = torch.randn(words, 16, dtype=dtype), torch.randint(words, (n,))
    limit = module.CHUNK_BYTES + 3 * hidden.nbytes + n * 64 + 2**18  # What a product on a CPU works in.

    def step(source: object) -> Tensor:
        result: Tensor = getattr(source, f"label_{what}")(hidden, weight, None, labels)
        if what == "loss":
            result.backward()
        return result

    step(module)  # What is allocated once.
    assert peak_bytes(lambda: step(module)) <= limit
    whole = peak_bytes(lambda: step(reference))
    assert whole > 8 * limit * (what == "loss") + 4 * limit * (what == "scores"), "the check does not see whole logits"
