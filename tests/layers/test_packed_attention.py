"""Packed rows equal rows by themselves; padding on the right needs no mask; both on every family, sparse and dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sparselora_dist import SparseLoRAConfig, apply_sparselora, selection
from sparselora_dist.apply import find_state
from sparselora_dist.layers.packed_attention import IMPLEMENTATION, PackedRows, use_packed_attention
from sparselora_dist.method.tokens import partition_tokens
from support.every_type import tiny_config, tiny_model
from support.models import ALL_LINEAR, FAMILIES, batch, gradients, tiny_lora

families = pytest.mark.parametrize("family", FAMILIES)
SPARSE = {"layers": {"ffn": {"0-2": 0.8}, "qk": {"0-2": 0.5}, "vo": {"0-2": 0.6}}, "rank": 4}
DENSE: dict[str, Any] = {"enabled": False}
settings_of = pytest.mark.parametrize("settings", [SPARSE, DENSE], ids=["sparse", "dense"])


def packed(data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of a padded batch in one line, and their lengths."""
    lengths = data["attention_mask"].sum(1)
    real = data["attention_mask"].bool()
    labels = data["labels"].clone()
    labels[:, 0] = -100
    line = {
        "input_ids": data["input_ids"][real][None],
        "labels": labels[real][None],
        "position_ids": torch.cat([torch.arange(int(n)) for n in lengths])[None],
    }
    return line, lengths


def build(family: str, settings: dict[str, Any], **options: Any) -> Any:
    model = tiny_lora(family, ALL_LINEAR, **options)
    use_packed_attention(model.get_base_model())
    return apply_sparselora(model, SparseLoRAConfig.from_dict(settings))


def step(model: Any, inputs: dict[str, Any], items: int) -> Tensor:
    loss = model(**inputs, use_cache=False, num_items_in_batch=items).loss
    loss.backward()
    return loss.detach()


def assert_equal_steps(one: Any, other: Any, losses: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    expected, got = gradients(one), gradients(other)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


def assert_equal_masks(one: Any, other: Any) -> None:
    expected, got = selection(one), selection(other)
    assert expected.keys() == got.keys()
    for layer, groups in expected.items():
        assert all(torch.equal(channels, got[layer][group]) for group, channels in groups.items())


@families
@settings_of
@pytest.mark.parametrize("window", [None, 8], ids=["full", "window"])
def test_packed_equals_padded(family: str, settings: dict[str, Any], window: int | None) -> None:
    """With Transformers' own padding mask on the other side: losses, gradients, masks."""
    options: dict[str, Any] = {}
    if window is not None and family != "llama":
        options = {"sliding_window": window}
        if family.startswith("qwen"):
            options |= {"use_sliding_window": True, "max_window_layers": 1}
    data = batch()
    labels = int((data["labels"][:, 1:] != -100).sum())
    padded, line = build(family, settings, **options), build(family, settings, **options)
    padded.get_base_model().set_attn_implementation("sdpa")
    loss = step(padded, data, labels)
    inputs, lengths = packed(data)
    rows = PackedRows.of(lengths, torch.device("cpu")).arguments(IMPLEMENTATION)
    assert_equal_steps(padded, line, (loss, step(line, inputs | rows, labels)))
    assert_equal_masks(padded, line)


@families
def test_packed_equals_row_by_row(family: str) -> None:
    """Dense: nothing ties the rows together, so each may be run alone."""
    data = batch()
    labels = int((data["labels"][:, 1:] != -100).sum())
    alone, line = build(family, DENSE), build(family, DENSE)
    loss = torch.zeros(())
    for row, length in enumerate(data["attention_mask"].sum(1).tolist()):
        loss += step(alone, {name: t[row : row + 1, :length] for name, t in data.items()}, labels)
    inputs, lengths = packed(data)
    rows = PackedRows.of(lengths, torch.device("cpu")).arguments(IMPLEMENTATION)
    assert_equal_steps(alone, line, (loss, step(line, inputs | rows, labels)))


@families
def test_no_mask_is_needed_for_padding_on_the_right(family: str) -> None:
    """Sparse: the partition says what is padding, attention never looks there."""
    data = batch()
    labels = int((data["labels"][:, 1:] != -100).sum())
    masked, bare = build(family, SPARSE), build(family, SPARSE)
    loss = step(masked, data, labels)
    state: Any = find_state(bare)
    state.context.hand_over(data["labels"], partition_tokens(data["labels"], data["attention_mask"]))
    rest = {name: t for name, t in data.items() if name != "attention_mask"}
    assert_equal_steps(masked, bare, (loss, step(bare, rest, labels)))
    assert_equal_masks(masked, bare)


@families
def test_a_row_does_not_see_its_neighbours(family: str) -> None:
    """Bit for bit: another row in the middle leaves the logits of the others as they are."""
    model = build(family, DENSE).eval()
    inputs, lengths = packed(batch())
    rows = PackedRows.of(lengths, torch.device("cpu")).arguments(IMPLEMENTATION)
    changed = copy.deepcopy(inputs)
    first, second = (int(n) for n in lengths[:2])
    changed["input_ids"][0, first : first + second] = 7
    with torch.no_grad():
        before, after = (model(**some, **rows, use_cache=False).logits[0] for some in (inputs, changed))
    differs = (before != after).any(-1)
    assert differs[first : first + second].all()
    assert not differs[:first].any() and not differs[first + second :].any()


@families
def test_batches_from_outside_with_position_ids(family: str) -> None:
    """As TRL's padding-free collator makes them: no mask, positions that begin anew; any attention of Transformers."""
    data = batch()
    labels = int((data["labels"][:, 1:] != -100).sum())
    padded, line = build(family, SPARSE), build(family, SPARSE)
    loss = step(padded, data, labels)
    inputs, _ = packed(data)
    assert_equal_steps(padded, line, (loss, step(line, inputs, labels)))
    assert_equal_masks(padded, line)


def test_only_sdpa_is_replaced() -> None:
    model = tiny_lora().get_base_model()
    model.set_attn_implementation("eager")
    use_packed_attention(model)
    assert model.config._attn_implementation == "eager"


def test_padding_on_the_left_with_a_softcap() -> None:
    """A query of the padding sees nothing, and must not make its whole row NaN in the next layer."""
    config = tiny_config("gemma2")
    config.attn_logit_softcapping = 5.0
    model = tiny_model("gemma2", config).eval()
    ids, mask = torch.arange(3, 17).view(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        use_packed_attention(model, instead_of=("eager", "sdpa"))
        got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
