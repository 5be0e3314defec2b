"""Under autocast an adapter's fp32 master is cast once for a forward and its recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.layers import casts
from support.models import batch, gradients, tiny_lora

FACTORS = 3 * 4 * 2


def make(reentrant: bool | None) -> PeftModel:
    model = tiny_lora()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    apply_sparselora(model, SparseLoRAConfig.from_dict({"layers": {"qk": {"0-2": 0.5}}}))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def loss_of(model: PeftModel, seed: int = 0) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch(seed=seed), use_cache=False).loss


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was cast."""
    seen: list[Any] = []
    original = casts.compute_input

    def cast(x: Any) -> Any:
        seen.append(x)
        return original(x)

    monkeypatch.setattr(casts, "compute_input", cast)
    return seen


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_once_and_again_in_the_next_forward(reentrant: bool | None, made: list[Any]) -> None:
    expected, model = make(None), make(reentrant)
    loss_of(expected).backward()
    made.clear()
    loss_of(model).backward()
    assert len(made) == FACTORS
    reference, mine = gradients(expected), gradients(model)
    assert reference.keys() == mine.keys() and all(g.dtype == torch.float32 for g in mine.values())
    for name, gradient in reference.items():
        assert torch.equal(gradient, mine[name]), name
    loss_of(model).backward()
    assert len(made) == 2 * FACTORS


def test_a_change_without_a_new_version_is_seen_by_the_next_forward() -> None:
    model = make(False)
    before = loss_of(model)
    before.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)
    fresh = make(False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model), loss_of(fresh)) and loss_of(model) != before


def test_two_forwards_that_wait_for_their_backward() -> None:
    model, expected = make(False), make(None)
    for each in (model, expected):
        sum(loss_of(each, seed) for seed in (1, 2)).backward()
    reference = gradients(expected)
    assert all(torch.equal(reference[name], gradient) for name, gradient in gradients(model).items())
