"""A probe is the sparse forward of training at the asked sites, and nothing anywhere else; what samples and layers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparselora_dist import SparseLoRAConfig, apply_sparselora
from sparselora_dist.apply import find_state
from sparselora_dist.data import NO_ROW, TokenDataset, collate
from sparselora_dist.method.tokens import partition_tokens
from sparselora_dist.quality.importance import importance_of
from sparselora_dist.quality.sample import context_mask, data_shape, take_sample
from sparselora_kernels import kept_count
from support.models import batch, tiny_lora

CHANNELS = {"ffn": 104, "qk": 8, "vo": 16}
EVERYWHERE = {group: {"0-2": 0.75} for group in CHANNELS}


@pytest.mark.parametrize("group", CHANNELS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_probe_is_the_sparse_training_forward(group: str, layer: int) -> None:
    """The same masks, products and loss, in evaluation mode, out of modules made for another number of channels."""
    rows = batch()
    trained = apply_sparselora(tiny_lora(), SparseLoRAConfig(rank=4, layers={group: {str(layer): 0.5}}))
    probed = apply_sparselora(tiny_lora(), SparseLoRAConfig(rank=4, layers=EVERYWHERE)).eval()
    state = find_state(probed)
    assert state is not None
    expected = trained(**rows).loss
    with torch.no_grad():
        dense = probed(**rows).loss
        state.context.probe = {(layer, group): kept_count(CHANNELS[group], 0.5)}
        assert torch.equal(probed(**rows).loss, expected)
        state.context.probe = {}
        assert torch.allclose(probed(**rows).loss, dense)
        state.context.probe = None
        assert torch.equal(probed(**rows).loss, dense)
    assert state.context.last is None and state.context.counts.context == 0, "a probe is no training forward"


def dataset(rows: int = 9, labels: bool = True) -> TokenDataset:
    lengths = [3 + 2 * row for row in range(rows)]
    mask = np.concatenate([np.arange(n) >= (n // 2 if labels else 0) for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenDataset("rows", np.arange(offsets[-1]) % 90 + 3, mask, offsets)


def test_context_tokens_are_those_of_the_partition() -> None:
    data = dataset()
    rows = collate(data, range(len(data)), 0)
    partition = partition_tokens(rows["labels"], rows["attention_mask"])
    assert context_mask(data).sum() == partition.context.numel() == data_shape(data).context


def test_the_sample_is_whole_batches_longest_first() -> None:
    data = dataset()
    sample = take_sample(data, 6, 4, seed=3)
    assert [len(rows) for rows in sample.batches] == [4, 4] and sample.rows == 6
    assert sample.batches[1][2:] == (NO_ROW, NO_ROW)
    chosen = [row for rows in sample.batches for row in rows if row != NO_ROW]
    assert chosen == sorted(chosen, reverse=True), "longer rows have higher numbers here"
    assert sample.labels == data.label_counts[chosen].sum()
    assert sample == take_sample(data, 6, 4, seed=3)
    assert sample.sha256 != take_sample(data, 6, 4, seed=4).sha256
    assert take_sample(data, 100, 4, seed=3).rows <= len(data)


def test_a_layer_that_repeats_the_others_is_unimportant() -> None:
    torch.manual_seed(0)
    same, other = torch.randn(40, 16), torch.randn(40, 16)
    importance = importance_of([same, 3 * same + 1, same @ torch.linalg.qr(torch.randn(16, 16))[0], other])
    assert importance[:3] == pytest.approx(3 * [importance[0]], abs=1e-5), "scale, shift and rotation do not matter"
    assert importance[0] < 0.4 < importance[3] <= 1
    assert importance_of([same]) == [0.0]
