"""``selection(model)``: the channels that the last batch kept, by layer and group."""

from __future__ import annotations

import torch

from sparselora_dist import selection
from support.applied import outputs, sparse_model
from support.models import batch


def test_selection_is_sorted_indices_by_layer_and_group() -> None:
    model = sparse_model()
    assert selection(model) == {}
    outputs(model)
    chosen = selection(model)
    assert {layer: sorted(groups) for layer, groups in chosen.items()} == {
        0: ["ffn"],
        1: ["ffn", "qk", "vo"],
        2: ["qk"],  # The last layer's FFN runs at label positions only, whole.
    }
    for groups in chosen.values():
        for group, channels in groups.items():
            size, keep = {"ffn": (104, 21), "qk": (8, 4), "vo": (16, 8)}[group]
            assert channels.dtype == torch.int64 and len(channels) == keep
            assert channels.tolist() == sorted(set(channels.tolist()))
            assert int(channels[0]) >= 0 and int(channels[-1]) < size
    chosen[0]["ffn"].zero_()
    assert selection(model)[0]["ffn"].any(), "a caller can change the masks"


def test_selection_is_empty_for_dense_forwards() -> None:
    model = sparse_model()
    with torch.no_grad():
        model.eval()(**batch())
    assert selection(model) == {}
    outputs(model.train())
    data = batch()
    del data["labels"]
    model(**data)
    assert selection(model) == {}
