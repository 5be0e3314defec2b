"""LM head and loss at label positions only: exact, in training forwards with labels, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparselora_dist import SparseLoRAConfig, apply_sparselora, remove_sparselora
from support.compare import assert_close, loss_logits
from support.models import FAMILIES, batch, gradients, tiny_lora


def packed(**options: Any) -> Any:
    return apply_sparselora(tiny_lora(), SparseLoRAConfig.from_dict({"enabled": False, **options}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("items", [None, 7])
def test_loss_and_gradients_are_those_of_the_whole_head(family: str, items: int | None) -> None:
    data, options = batch(), {} if items is None else {"num_items_in_batch": items}
    plain, model = tiny_lora(family), tiny_lora(family)
    apply_sparselora(model, SparseLoRAConfig.from_dict({"enabled": False}))
    expected, got = plain(**data, **options), model(**data, **options)
    expected.loss.backward(), got.loss.backward()
    labels = int((data["labels"][:, 1:] != -100).sum())
    assert got.logits.shape == (1, labels, 96)
    assert_close("loss", expected.loss, got.loss)
    assert_close("logits", loss_logits(expected.logits, data["labels"]), got.logits[0])
    mine = gradients(model)
    for name, gradient in gradients(plain).items():
        assert_close(name, gradient, mine[name], atol=1e-6)


def test_it_can_be_switched_off_and_removed() -> None:
    data = batch()
    assert packed(skip_unused_logits=False)(**data).logits.shape == (4, 24, 96)
    model = packed()
    remove_sparselora(model)
    expected, got = tiny_lora()(**data), model(**data)
    assert torch.equal(expected.logits, got.logits) and torch.equal(expected.loss, got.loss)
    assert "_loss_function" not in model.get_base_model().__dict__


def test_evaluation_and_forwards_without_labels_are_whole() -> None:
    model, data = packed(), batch()
    assert model.eval()(**data).logits.shape == (4, 24, 96)
    model.train()
    del data["labels"]
    assert model(**data).logits.shape == (4, 24, 96)


def test_positions_that_the_caller_chose_are_left_alone() -> None:
    data = batch()
    assert packed()(**data, logits_to_keep=24).logits.shape == (1, int((data["labels"][:, 1:] != -100).sum()), 96)
    del data["labels"]
    assert packed()(**data, logits_to_keep=3).logits.shape == (4, 3, 96)


def test_no_label_at_all_gives_zero_and_reaches_every_adapter() -> None:
    model, data = packed(), batch()
    data["labels"][:] = -100
    loss = model(**data, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
