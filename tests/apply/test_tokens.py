"""``sparse_tokens``: a forward without labels is that of the labels that were named for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparselora_dist import selection, sparse_tokens
from sparselora_dist.apply import find_state
from support.applied import outputs, sparse_model
from support.compare import assert_close
from support.models import batch, gradients, tiny_lora


def bare() -> tuple[dict[str, Tensor], Tensor]:
    data = batch()
    return data, data.pop("labels")


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("named", ["labels", "completion_mask"])
def test_a_loss_of_ones_own_is_that_of_the_model(named: str) -> None:
    data, labels = bare()
    expected = sparse_model()
    loss = expected(**data, labels=labels).loss
    loss.backward()
    model = sparse_model()
    given = labels if named == "labels" else labels != -100
    with sparse_tokens(model, **{named: given}):
        logits = model(**data).logits
    assert logits.shape == (4, 24, 96)
    got = own_loss(logits, labels)
    got.backward()
    assert_close("loss", loss, got)
    mine, theirs = gradients(model), gradients(expected)
    for name, gradient in theirs.items():
        assert_close(name, gradient, mine[name], atol=1e-6)
    one, other = selection(expected), selection(model)
    # Its last layer's FFN is not trimmed to the labels, so it chooses there, too.
    assert all(torch.equal(one[layer][group], other[layer][group]) for layer in one for group in one[layer])
    assert find_state(model).context.was_sparse
    assert find_state(model).context.counts == find_state(expected).context.counts


def test_logits_of_labels_alone() -> None:
    data, labels = bare()
    model = sparse_model()
    expected = model(**data, labels=labels).logits
    with sparse_tokens(model, labels=labels, logits="labels"):
        got = model(**data).logits
    assert got.shape == expected.shape and torch.equal(got, expected)


def test_policy_and_reference_are_computed_alike() -> None:
    data, labels = bare()
    model = sparse_model()
    with sparse_tokens(model, labels=labels):
        policy = model(**data).logits
        with torch.no_grad():
            assert torch.equal(model(**data).logits, policy)
        model.eval()
        dense = model(**data).logits
    assert not torch.allclose(dense, policy)
    torch.testing.assert_close(dense, tiny_lora(targets=model.peft_config["default"].target_modules)(**data).logits)


def test_it_ends_with_its_block() -> None:
    data, labels = bare()
    model = sparse_model()
    with pytest.raises(ZeroDivisionError), sparse_tokens(model, labels=labels):
        raise ZeroDivisionError
    with pytest.warns(UserWarning, match="without labels and was computed densely.*sparse_tokens"):
        model(**data)
    assert not find_state(model).context.was_sparse and outputs(model)[0].shape[0] == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "one of the two"),
        ({"labels": torch.ones(4, 24), "completion_mask": torch.ones(4, 24)}, "one of the two"),
        ({"completion_mask": torch.ones(24)}, r"completion_mask must be a \(rows, positions\) tensor, not \(24,\)"),
        ({"labels": [[1, 2]]}, r"labels must be a \(rows, positions\) tensor, not list"),
        ({"labels": torch.ones(4, 24), "logits": "some"}, "logits='some'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error), sparse_tokens(sparse_model(), **options):
        pass


def test_other_refusals() -> None:
    data, labels = bare()
    model = sparse_model(skip_unused_logits=False)
    with pytest.raises(ValueError, match=r"shape \(4, 20\).*called with \(4, 24\)"):  # noqa: SIM117
        with sparse_tokens(model, labels=labels[:, :20]):
            model(**data)
    with pytest.raises(RuntimeError, match="already open"):  # noqa: SIM117
        with sparse_tokens(model, labels=labels), sparse_tokens(model, labels=labels):
            pass
    with pytest.raises(ValueError, match="skip_unused_logits, which is off"):
        sparse_tokens(model, labels=labels, logits="labels").__enter__()
    with pytest.raises(ValueError, match="not sparse"):
        sparse_tokens(tiny_lora(), labels=labels).__enter__()
