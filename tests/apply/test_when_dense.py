"""Which forwards are dense: evaluation, generation, those without labels or gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparselora_dist import selection
from sparselora_dist.apply import find_state
from support.applied import families, outputs, sparse_model
from support.compare import assert_close
from support.models import ALL_LINEAR, batch, tiny_lora


@families
def test_evaluation_and_generation_are_dense(family: str) -> None:
    plain, model = tiny_lora(family, ALL_LINEAR).eval(), sparse_model(family).eval()
    data = batch(padding=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, plain(**data).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**data).loss, plain(**data).loss)
    prompt = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    for mode in (False, True):
        made = [m.train(mode).generate(**prompt, max_new_tokens=6, do_sample=False) for m in (plain, model)]
        assert torch.equal(*made)
        assert made[0].shape[1] > data["input_ids"].shape[1]


def test_training_without_labels_is_dense() -> None:
    plain, model, data = tiny_lora(targets=ALL_LINEAR), sparse_model(), batch()
    del data["labels"]
    torch.testing.assert_close(model(**data).logits, plain(**data).logits, rtol=1e-4, atol=1e-4)


def test_a_training_forward_without_gradients_is_dense_and_not_counted_where_references_are_dense() -> None:
    """The channels of the last step stay to be seen."""
    plain, model = tiny_lora(targets=ALL_LINEAR), sparse_model(reference="dense")
    outputs(model)
    counts, chosen = find_state(model).context.counts, selection(model)
    before = counts.dense, counts.context
    with torch.no_grad():
        got, expected = model(**batch(seed=3)), plain(**batch(seed=3))
    assert_close("logits", expected.logits, got.logits)
    assert_close("loss", expected.loss, got.loss)
    assert (counts.dense, counts.context) == before
    assert torch.equal(selection(model)[0]["ffn"], chosen[0]["ffn"])


def test_training_forwards_without_labels_are_warned_about_once() -> None:
    model, data = sparse_model(), batch()
    del data["labels"]
    with pytest.warns(UserWarning, match="without labels and was computed densely"):
        model(**data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**data)
