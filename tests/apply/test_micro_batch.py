"""The micro-batch that a forward opens: its tokens as its labels say; and that it is closed again."""

from __future__ import annotations

import pytest
import torch

from sparselora_dist.apply import find_state
from sparselora_dist.layers.hooks import BeginHook
from support.applied import assert_identical, outputs, sparse_model
from support.models import batch


def test_shift_labels_make_the_same_split() -> None:
    data = batch()
    model = sparse_model(skip_unused_logits=False)
    expected = model(**data).logits
    labels = data.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    assert torch.equal(model(**data, labels=None, shift_labels=shifted).logits, expected)


@pytest.mark.parametrize("skip", [False, True])
def test_shift_labels_win_over_labels(skip: bool) -> None:
    """Sequence parallelism passes both, and the loss reads the shifted ones."""
    data, model = batch(), sparse_model(skip_unused_logits=skip)
    shifted = torch.nn.functional.pad(data["labels"][:, 1:], (0, 1), value=-100)
    expected = sparse_model(skip_unused_logits=False)(**data)
    data["labels"] = torch.full_like(data["labels"], 7)  # Would make every position dense.
    got = model(**data, shift_labels=shifted)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


def test_the_token_lists_are_where_the_model_computes() -> None:
    """Labels may be on the host: the loss moves them. No second device here, so the meta device stands for it."""
    model, data = sparse_model(), batch()
    context = find_state(model).context
    ids = data["input_ids"].to("meta")
    embeds = torch.empty(4, 24, 48, device="meta")
    for args, kwargs in (((), {"input_ids": ids}), ((ids,), {}), ((), {"inputs_embeds": embeds})):
        BeginHook(context)(model, args, {**kwargs, "labels": data["labels"]})
        lists = context.last.partition.context, context.last.partition.dense, context.last.loss.rows
        assert [rows.device.type for rows in lists] == ["meta"] * 3
        context.finish(model)


def test_an_exception_in_a_forward_leaves_no_open_micro_batch() -> None:
    model = sparse_model()
    expected = outputs(model)
    with pytest.raises(Exception):  # noqa: B017
        model(**{**batch(), "input_ids": torch.full((4, 24), 10_000)})
    assert not find_state(model).context.in_forward
    assert_identical(expected, outputs(model))
