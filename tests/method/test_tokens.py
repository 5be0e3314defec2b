"""Token partition: a position is dense if its own or the next position's label is trained on."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparselora_dist.method.tokens import partition_tokens


def by_definition(labels: Tensor, mask: Tensor) -> tuple[list[int], list[int]]:
    """(dense, context) flat positions, position by position."""
    rows, length = labels.shape
    dense, context = [], []
    for row in range(rows):
        for t in range(length):
            own = labels[row, t] != -100
            following = t + 1 < length and labels[row, t + 1] != -100
            if own or following:
                dense.append(row * length + t)
            elif mask[row, t]:
                context.append(row * length + t)
    return dense, context


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Labels with holes anywhere, padding on either side, never a label at padding."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    labels, mask = torch.full((rows, length), -100), torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        start = draw(st.integers(0, length))
        end = draw(st.integers(start, length))
        mask[row, start:end] = 1
        for t in range(start, end):
            if draw(st.booleans()):
                labels[row, t] = draw(st.integers(0, 9))
    return labels, mask


@settings(max_examples=150, deadline=None)
@given(batches())
def test_equals_the_definition(data: tuple[Tensor, Tensor]) -> None:
    labels, mask = data
    got = partition_tokens(labels, mask)
    dense, context = by_definition(labels, mask)
    assert got.dense.tolist() == dense
    assert got.context.tolist() == context
    assert got.tokens == labels.numel()
    flat, length = labels.flatten().tolist(), labels.shape[1]
    read = [t for t in range(len(flat) - 1) if (t + 1) % length and flat[t + 1] != -100]
    assert got.loss_rows.tolist() == read
    assert got.loss_labels.tolist() == [flat[t + 1] for t in read]
    assert set(read) <= set(dense)


@settings(max_examples=100, deadline=None)
@given(batches())
def test_shifted_labels_give_the_same_partition(data: tuple[Tensor, Tensor]) -> None:
    """The first position's own label has no place in shifted labels, and no loss is taken there."""
    labels, mask = data
    labels[:, 0] = -100
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    plain, got = partition_tokens(labels, mask), partition_tokens(shifted, mask, shifted=True)
    assert torch.equal(plain.dense, got.dense)
    assert torch.equal(plain.context, got.context)
    assert torch.equal(plain.loss_rows, got.loss_rows) and torch.equal(plain.loss_labels, got.loss_labels)


def test_the_last_prompt_token_is_dense() -> None:
    labels = torch.tensor([[-100, -100, -100, 5, 6], [-100, 7, 8, -100, -100]])
    got = partition_tokens(labels)
    assert got.dense.tolist() == [2, 3, 4, 5, 6, 7]
    assert got.context.tolist() == [0, 1, 8, 9]


def test_padding_is_in_neither_list() -> None:
    labels = torch.tensor([[-100, -100, -100, 5], [-100, 5, -100, -100]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    got = partition_tokens(labels, mask)
    assert got.dense.tolist() == [2, 3, 4, 5]
    assert got.context.tolist() == [1]
    assert (got.tokens, got.dense.numel() + got.context.numel()) == (8, 5)


def test_no_mask_or_one_of_another_kind_means_no_padding() -> None:
    labels = torch.full((2, 3), -100)
    for mask in (None, torch.zeros(2, 1, 3, 3), {"full_attention": torch.zeros(2, 1, 3, 3)}):
        assert partition_tokens(labels, mask).context.tolist() == list(range(6))


def test_everything_trained_leaves_no_context() -> None:
    got = partition_tokens(torch.ones(2, 3, dtype=torch.int64))
    assert got.context.numel() == 0 and got.context.dtype == torch.int64
    assert got.dense.tolist() == list(range(6))


def test_the_loss_reads_the_position_before_each_label_and_never_crosses_rows() -> None:
    got = partition_tokens(torch.tensor([[5, 6, -100, 7], [8, -100, -100, 1]]))
    assert got.loss_rows.tolist() == [0, 2, 6] and got.loss_labels.tolist() == [6, 7, 1]


def test_to_a_device_keeps_everything() -> None:
    plain = partition_tokens(torch.tensor([[5, 6, -100, 7], [8, -100, -100, 1]]))
    moved = plain.to(torch.device("meta"))
    for field in dataclasses.fields(plain):
        before, after = getattr(plain, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert after.device.type == "meta" and after.shape == before.shape
        else:
            assert after == before
